"""Frames of the control channel: a length, a kind, a body. Heartbeats are complete frames here.

Everything read is hostile until proven otherwise. Knows no sockets and no threads.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

PROTOCOL = 6

# Kinds of fixed layout, which are handled without JSON; the messages' own kinds are above these.
CHALLENGE, PROOF, ACCEPTED, REJECTED, HEARTBEAT = range(1, 6)
FIRST_MESSAGE_KIND = 16

_HEADER = struct.Struct("!IB")  # nbytes of the body, kind
_HEARTBEAT = struct.Struct("!QQI12s")  # bytes in place, bytes moved, ms of patience, stage
_MAX_COUNT = (1 << 64) - 1
_MAX_PATIENCE_S = 600.0
_MAX_INTERVAL_S = 10.0


class ProtocolError(ValueError):
    """The other end sent what none of ours sends; nothing after it on this connection counts."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a heartbeat carries: counters that grow as bytes move.

    `done` are the bytes that are where they belong, `moved` those of all stages together; in the
    sender's heartbeats of the whole group. For `patience_s` the rank may be silent, since something
    holds its interpreter. `stage` is what it waits for: a word of at most 12 letters and digits.
    """

    done: int = 0
    moved: int = 0
    patience_s: float = 0.0
    stage: str = ""


def frame_of(kind: int, body: bytes) -> bytes:
    """The frame as it travels."""
    return _HEADER.pack(len(body), kind) + body


def heartbeat_frame(progress: Progress) -> bytes:
    """A heartbeat; counters that overflow stay at their largest."""
    body = _HEARTBEAT.pack(
        min(progress.done, _MAX_COUNT),
        min(progress.moved, _MAX_COUNT),
        int(1000 * min(progress.patience_s, _MAX_PATIENCE_S)),
        progress.stage.encode(),
    )
    return frame_of(HEARTBEAT, body)


def progress_of(body: bytes) -> Progress:
    """What a heartbeat says; raises ProtocolError."""
    if len(body) != _HEARTBEAT.size:
        raise ProtocolError("a heartbeat of another size")
    done, moved, patience_ms, padded = _HEARTBEAT.unpack(body)
    stage = padded.rstrip(b"\0").decode("ascii", "replace")
    if stage and not (stage.isascii() and stage.isalnum()):
        raise ProtocolError("a heartbeat with a stage that is no word")
    return Progress(done, moved, min(patience_ms / 1000, _MAX_PATIENCE_S), stage)


def heartbeat_interval_s(limit_s: float, num_workers: int) -> float:
    """How far heartbeats are apart: rarer in large groups, but two fit into the limit.

    The sender takes in and sends one for each worker; at 120 us of interval for each worker that
    is about a quarter of a processor.
    """
    frequent = min(0.5, limit_s / 4)
    return min(limit_s / 2.5, _MAX_INTERVAL_S, max(frequent, 120e-6 * num_workers))


class FrameReader:
    """Bytes in, frames out, one at a time, so that what came before a fault still counts.

    `limits` are the largest bodies, in bytes, of the kinds that may come; checked before a body is
    buffered.
    """

    def __init__(self, limits: Mapping[int, int]) -> None:
        self.limits = limits
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes in as they came off the socket."""
        self._buffer += data

    def next_frame(self) -> tuple[int, bytes] | None:
        """The next complete frame, None where more bytes are needed; raises ProtocolError."""
        if len(self._buffer) < _HEADER.size:
            return None
        nbytes, kind = _HEADER.unpack_from(self._buffer)
        limit = self.limits.get(kind)
        if limit is None:
            raise ProtocolError(f"an unexpected message, of kind {kind}")
        if nbytes > limit:
            raise ProtocolError(f"a message of {nbytes} bytes is over the limit of {limit}")
        end = _HEADER.size + nbytes
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        return kind, body
