"""The messages of the control channel as pydantic models, each with its sender and its limit.

A frame's kind selects the model, its body is the model's JSON. An instance has been validated.
The transfer and the bench declare further messages with other kinds.
"""

from __future__ import annotations

import zlib
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from packcast.checkpoint.outgoing import MAX_OFFERED_NBYTES
from packcast.control.frames import (
    FIRST_MESSAGE_KIND,
    HEARTBEAT,
    Progress,
    ProtocolError,
    frame_of,
    heartbeat_frame,
)
from packcast.control.rank_info import Rank, RankInfo, printable
from packcast.errors import PackcastError, error_from_code
from packcast.units import KIB, MIB

MAX_SENTENCE_LENGTH = 2000
MAX_SECONDS = 1e9
MAX_MISSING = 8
# Its files are bounded before anybody joins (checkpoint/outgoing.py); the rest of it is small.
MAX_OFFER_NBYTES = MAX_OFFERED_NBYTES + 16 * MIB

Side = Literal["sender", "worker", "both", "handshake"]

_kinds: dict[int, type[Message]] = {}


def _one_line(text: object) -> object:
    """Shorten and escape, at both ends: it will be printed in a terminal."""
    if not isinstance(text, str):
        return text
    return printable(" ".join(text[:MAX_SENTENCE_LENGTH].split()))[:MAX_SENTENCE_LENGTH]


Sentence = Annotated[str, BeforeValidator(_one_line)]


class Message(BaseModel):
    """A message: `class Ready(Message, kind=20, by="worker", limit=64 * KIB)`, then its fields.

    `limit` is the largest JSON, in bytes.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[int]
    by: ClassVar[Side]
    limit: ClassVar[int]

    def __init_subclass__(cls, *, kind: int, by: Side, limit: int = 4 * KIB) -> None:
        assert kind in range(FIRST_MESSAGE_KIND, 256)
        assert kind not in _kinds, f"kind {kind} is taken"
        cls.kind, cls.by, cls.limit = kind, by, limit
        _kinds[kind] = cls

    def encode(self) -> bytes:
        """The frame; raises PackcastError if the message is over its limit."""
        body = self._to_body()
        if len(body) > self.limit:
            name = type(self).__name__
            raise PackcastError(f"a {name} of {len(body)} bytes is over its limit, {self.limit}")
        return frame_of(self.kind, body)

    def _to_body(self) -> bytes:
        return self.model_dump_json().encode()

    @classmethod
    def _from_body(cls, body: bytes) -> Self:
        return cls.model_validate_json(body)


def decode(kind: int, body: bytes) -> Message:
    """The message in a frame; raises ProtocolError."""
    cls = _kinds.get(kind)
    if cls is None or len(body) > cls.limit:
        raise ProtocolError(f"an unexpected message, of kind {kind}")
    try:
        return cls._from_body(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        what = printable(f"{where}: {first['msg']}" if where else first["msg"])
        raise ProtocolError(f"a malformed {cls.__name__}: {what}") from None


def limits_by(side: Literal["sender", "worker"]) -> dict[int, int]:
    """The kinds that this side may send once it has joined, with their limits."""
    limits = {kind: cls.limit for kind, cls in _kinds.items() if cls.by in (side, "both")}
    return limits | {HEARTBEAT: len(heartbeat_frame(Progress()))}


class Hello(Message, kind=16, by="handshake", limit=32 * KIB):
    """A worker's introduction, after the token's handshake."""

    info: RankInfo
    heartbeat_timeout_s: Annotated[float, Field(gt=0, le=MAX_SECONDS)]


class Welcome(Message, kind=17, by="handshake", limit=32 * KIB):
    """The worker has been accepted; how often it must send a heartbeat."""

    sender: RankInfo
    heartbeat_interval_s: Annotated[float, Field(gt=0, le=MAX_SECONDS)]


class Joined(Message, kind=18, by="sender"):
    """All ranks have joined."""

    rank: Rank
    world_size: Annotated[int, Field(ge=1, le=1_000_001)]


class JoinStatus(Message, kind=23, by="sender"):
    """How many workers are there so far, for a worker that waits for the others: some of the ranks
    that are missing, where they are known, and how long the sender waits for them yet."""

    joined: Annotated[int, Field(ge=0, le=1_000_000)]
    wanted: Annotated[int, Field(ge=1, le=1_000_000)]
    missing: Annotated[tuple[Rank, ...], Field(max_length=MAX_MISSING)]
    left_s: Annotated[float, Field(ge=0, le=MAX_SECONDS)]


class Abort(Message, kind=19, by="both", limit=64 * KIB):
    """Why the transfer ends, or why the receiver may not take part. The same in every protocol."""

    code: Annotated[int, Field(ge=1, le=255)]
    message: Sentence
    hint: Sentence | None

    @classmethod
    def of(cls, error: PackcastError) -> Abort:
        """The message for an error."""
        return cls(code=error.exit_code, message=error.message, hint=error.hint)

    def error(self, *, said_by: str | None = None) -> PackcastError:
        """The error that this carries; `said_by` goes before its sentence."""
        text = self.message or "gave up without a reason"
        if said_by is not None and said_by not in text:
            text = f"{said_by}: {text}"
        return error_from_code(self.code, text, self.hint or None)


class Bye(Message, kind=20, by="both"):
    """The connection ends, which is no loss once committed."""


class Commit(Message, kind=21, by="sender"):
    """The point of no return, which counts on arrival; `code` is the exit code of the whole."""

    code: Annotated[int, Field(ge=0, le=255)] = 0


class OfferMessage(Message, kind=22, by="sender", limit=MAX_OFFER_NBYTES):
    """The offer, compressed; the receiving thread decompresses it, not the control thread."""

    compressed: bytes

    @classmethod
    def of(cls, content: bytes) -> OfferMessage:
        """Compressed once for all workers."""
        if len(content) > MAX_OFFER_NBYTES:
            raise PackcastError(f"an offer of {len(content)} bytes is over the limit")
        return cls(compressed=zlib.compress(content, 1))

    def content(self, limit: int = MAX_OFFER_NBYTES) -> bytes:
        """The offer; ProtocolError if it is damaged, or of more than `limit` bytes."""
        inflate = zlib.decompressobj()
        try:
            content = inflate.decompress(self.compressed, limit)
        except zlib.error as error:
            raise ProtocolError("the offer is not compressed as it should be") from error
        if not inflate.eof or inflate.unused_data:
            raise ProtocolError(f"the offer is incomplete, or over the limit of {limit} bytes")
        return content

    def _to_body(self) -> bytes:
        return self.compressed

    @classmethod
    def _from_body(cls, body: bytes) -> Self:
        return cls(compressed=body)
