"""Frames of the control channel: a 4-byte length and a JSON object with a `kind`.

Everything read here is hostile until proven otherwise. Knows no sockets and no threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from packcast.checkpoint.outgoing import MAX_OFFERED_NBYTES
from packcast.errors import PackcastError, error_from_code
from packcast.group.member import printable
from packcast.units import KIB, MIB

PROTOCOL = 3

LENGTH_NBYTES = 4
MAX_KIND_LENGTH = 32
MAX_SENTENCE_LENGTH = 2000

# What the channel itself says; every other kind is handed to whoever waits for it.
RESERVED_KINDS = frozenset(
    {"CHALLENGE", "HELLO", "WELCOME", "REFUSED", "JOINED", "HEARTBEAT", "ARMED", "ABORT", "BYE"}
)

Message = dict[str, object]


class WireError(ValueError):
    """A peer sent what no peer of ours sends; nothing after it on this connection counts."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest message taken, in bytes: for most kinds, and for the few larger ones."""

    most: int
    larger: Mapping[str, int] = field(default_factory=dict)

    def of(self, kind: str) -> int:
        """The limit for messages of this kind."""
        return self.larger.get(kind, self.most)


BEFORE_PROOF = Limits(16 * KIB)
FROM_WORKER = Limits(64 * KIB, {"PROVED": 16 * MIB})
# An OFFER's files are bounded before anybody joins (checkpoint/outgoing.py); the rest is small.
FROM_SENDER = Limits(16 * MIB, {"OFFER": MAX_OFFERED_NBYTES + 16 * MIB})


def encode_frame(message: Mapping[str, object], limits: Limits) -> bytes:
    """The message as it travels, `kind` first; raises PackcastError where it is over its limit."""
    kind = message["kind"]
    if not isinstance(kind, str) or not 0 < len(kind) <= MAX_KIND_LENGTH or not kind.isidentifier():
        raise ValueError(f"{kind!r} is not a kind of message")
    # The reader looks for the kind at the very beginning, before it takes a large message in.
    ordered = {"kind": kind, **message}
    # Not in ASCII, as which six bytes stand for what two or three are: a header full of emoji, well
    # within the format's bound, would be over ours. A path's undecodable bytes are surrogates.
    text = json.dumps(ordered, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    body = text.encode("utf-8", "surrogatepass")
    if len(body) > limits.of(kind):
        raise PackcastError(f"a {kind} of {len(body)} bytes is over its limit, {limits.of(kind)}")
    return len(body).to_bytes(LENGTH_NBYTES, "big") + body


class FrameReader:
    """Bytes in, messages out, one at a time, so that what came before a fault still counts."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.message_nbytes = 0  # of the message returned last
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes in as they came off the socket."""
        self._buffer += data

    def next_message(self) -> Message | None:
        """The next complete message, None where more bytes are needed; raises WireError."""
        if len(self._buffer) < LENGTH_NBYTES:
            return None
        nbytes = int.from_bytes(self._buffer[:LENGTH_NBYTES], "big")
        end = LENGTH_NBYTES + nbytes
        if nbytes > self.limits.most:
            self._check_large(nbytes)
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[LENGTH_NBYTES:end])
        del self._buffer[:end]
        self.message_nbytes = nbytes
        return _decode(body, self.limits)

    def _check_large(self, nbytes: int) -> None:
        # Decided as soon as the kind can be seen: what may not be large is never buffered.
        seen = bytes(self._buffer[LENGTH_NBYTES : LENGTH_NBYTES + MAX_KIND_LENGTH + 16])
        for kind, limit in self.limits.larger.items():
            opening = b'{"kind":"' + kind.encode() + b'"'
            if nbytes <= limit and opening.startswith(seen[: len(opening)]):
                return
        raise WireError(f"a message of {nbytes} bytes is over the limit of {self.limits.most}")


def _decode(body: bytes, limits: Limits) -> Message:
    try:
        message = json.loads(body.decode("utf-8", "surrogatepass"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError("a message is not JSON") from error
    kind = message.get("kind") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(kind, str) or len(kind) > MAX_KIND_LENGTH:
        raise WireError("a message is not an object with a kind")
    if len(body) > limits.of(kind):
        raise WireError(f"a {printable(kind)} of {len(body)} bytes is over the limit")
    return message


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def sentence(value: object, otherwise: str) -> str:
    """A peer's text, cut and made printable: it will stand in someone's terminal."""
    if not isinstance(value, str) or not value.strip():
        return otherwise
    return printable(" ".join(value[:MAX_SENTENCE_LENGTH].split()))


def error_message(kind: str, error: PackcastError) -> Message:
    """The error as an ABORT or a REFUSED carries it."""
    return {
        "kind": kind,
        "code": error.exit_code,
        "message": error.message[:MAX_SENTENCE_LENGTH],
        "hint": None if error.hint is None else error.hint[:MAX_SENTENCE_LENGTH],
    }


def error_of(message: Message, *, said_by: str | None = None) -> PackcastError:
    """The error that an ABORT or a REFUSED carries, its sentence opened by who said it."""
    code = message.get("code")
    if not isinstance(code, int) or isinstance(code, bool) or not 0 < code < 256:
        code = 5
    text = sentence(message.get("message"), "gave up without a reason")
    if said_by is not None and said_by not in text:
        text = f"{said_by}: {text}"
    hint = sentence(message.get("hint"), "")
    return error_from_code(code, text, hint or None)
