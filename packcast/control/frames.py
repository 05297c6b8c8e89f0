"""Frames of the control channel: a length, a kind, a body; and the heartbeats.

All input is treated as hostile. Knows no sockets and no threads.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

PROTOCOL = 6

# Kinds of fixed layout, without JSON; the kinds of messages are above these.
CHALLENGE, PROOF, ACCEPTED, REJECTED, HEARTBEAT = range(1, 6)
FIRST_MESSAGE_KIND = 16

_HEADER = struct.Struct("!IB")  # nbytes of the body, kind
_HEARTBEAT = struct.Struct("!QQI12s")  # bytes in place, bytes moved, ms of patience, stage
_MAX_COUNT = (1 << 64) - 1
_MAX_PATIENCE_S = 600.0
_MAX_INTERVAL_S = 10.0


class ProtocolError(ValueError):
    """The other end broke the protocol; the rest of the connection is ignored."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The content of a heartbeat: counters that grow as bytes move.

    `done` are the bytes at their destination, `moved` those of all stages together; in the
    sender's heartbeats those of the whole group. The rank may miss heartbeats for `patience_s`,
    since something holds its interpreter. `stage` is what it waits for: at most 12 letters and
    digits.
    """

    done: int = 0
    moved: int = 0
    patience_s: float = 0.0
    stage: str = ""


def frame_of(kind: int, body: bytes) -> bytes:
    """The frame's bytes."""
    return _HEADER.pack(len(body), kind) + body


def heartbeat_frame(progress: Progress) -> bytes:
    """A heartbeat; counters saturate."""
    body = _HEARTBEAT.pack(
        min(progress.done, _MAX_COUNT),
        min(progress.moved, _MAX_COUNT),
        int(1000 * min(progress.patience_s, _MAX_PATIENCE_S)),
        progress.stage.encode(),
    )
    return frame_of(HEARTBEAT, body)


def progress_of(body: bytes) -> Progress:
    """The content of a heartbeat; raises ProtocolError."""
    if len(body) != _HEARTBEAT.size:
        raise ProtocolError("a heartbeat of another size")
    done, moved, patience_ms, padded = _HEARTBEAT.unpack(body)
    stage = padded.rstrip(b"\0").decode("ascii", "replace")
    if stage and not (stage.isascii() and stage.isalnum()):
        raise ProtocolError("a heartbeat with a stage that is no word")
    return Progress(done, moved, min(patience_ms / 1000, _MAX_PATIENCE_S), stage)


def heartbeat_interval_s(limit_s: float, num_workers: int) -> float:
    """The time between heartbeats: longer in large groups, but less than half the limit.

    The sender receives and sends one for each worker; with 120 us of interval for each worker
    that takes about a quarter of a processor.
    """
    frequent = min(0.5, limit_s / 4)
    return min(limit_s / 2.5, _MAX_INTERVAL_S, max(frequent, 120e-6 * num_workers))


class FrameReader:
    """Bytes in, frames out, one at a time, so that frames before a fault still count.

    `limits` has the largest body, in bytes, of each allowed kind; checked before a body is
    buffered.
    """

    def __init__(self, limits: Mapping[int, int]) -> None:
        self.limits = limits
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data

    def next_frame(self) -> tuple[int, bytes] | None:
        """The next complete frame, None if more bytes are needed; raises ProtocolError."""
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
