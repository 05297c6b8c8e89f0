"""The consumer's end: chunks go from slots through staging to a sink, each block proven on the way.

Threads compare every block with its digest in the chunk's trailer before the sink sees it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

from packcast.checkpoint.outgoing import FileSpec
from packcast.ends.digests import BlockDigests, block_digests
from packcast.ends.staging import (
    CLOSE_LIMIT_S,
    Buffers,
    Lease,
    Staging,
    join_all,
    make_staging,
    use_device,
)
from packcast.errors import PackcastError, TransferError, as_packcast_error
from packcast.packed.counters import Stage
from packcast.packed.lanes import Mark
from packcast.packed.plan import (
    BLOCK,
    DIGEST_NBYTES,
    Chunk,
    Extent,
    Piece,
    num_blocks,
    piece_nbytes,
    pieces_of,
)
from packcast.packed.ring import Slot
from packcast.packed.trailer import read_trailer


class Sink(Protocol):
    """Where a worker's bytes go: write, verify, discard."""

    notes: list[str]  # what a person should know although it went well

    @property
    def stage(self) -> Stage:
        """The name under which its work is counted."""

    def prepare(self) -> None:
        """Before READY: check and reserve; raises DestinationError or CheckpointError."""

    def put(self, file: int, offset: int, data: memoryview) -> None:
        """Take a proven run of bytes; from many threads at once, disjoint runs."""

    def finish(self) -> None:
        """After the last `put`: make it durable."""

    def publish(self) -> None:
        """After COMMIT: make it appear."""

    def abort(self) -> None:
        """Leave nothing behind; from any thread, at any time before `publish`."""

    def result(self) -> dict[str, object]:
        """What there is to report."""


class _Arrival:
    """A received chunk until the last of its pieces is done: they share its trailer."""

    def __init__(self, chunk: Chunk, trailer: Lease, num_pieces: int) -> None:
        self.chunk = chunk
        self._trailer = trailer
        self._left = num_pieces
        self._lock = threading.Lock()
        self._digests: bytes | None = None

    def digests(self, tag: bytes) -> bytes:
        """The block digests; valid once a piece's mark has passed, which follows the trailer's."""
        with self._lock:
            if self._digests is None:
                blocks = sum(num_blocks(extent.nbytes) for extent in self.chunk.extents)
                self._digests = read_trailer(self._trailer.view, tag, self.chunk, blocks)
            return self._digests

    def piece_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._trailer.release()


class Landing:
    """Takes chunks out of slots and puts their blocks into `sink`, with `num_threads` threads.

    A damaged block ends it; a `tolerant` one goes on, and `digests` tell what came.
    """

    def __init__(
        self,
        sink: Sink,
        files: Sequence[FileSpec],
        buffers: Buffers,
        *,
        num_threads: int,
        tolerant: bool = False,
    ) -> None:
        self.digests = BlockDigests([spec.nbytes for spec in files])
        self._sink = sink
        self._tolerant = tolerant
        self._held_up_by: Stage = sink.stage  # what the newest piece took longest for
        self._files = files
        self._ring = buffers.ring
        self._counters = buffers.ring.counters
        self._tag = buffers.tag
        self._piece_nbytes = piece_nbytes(buffers.buffer_size)
        self._staging, self._trailers = make_staging(buffers)
        self._queue: SimpleQueue[tuple[_Arrival, Piece, Lease, Mark] | None] = SimpleQueue()
        self._failure: PackcastError | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"packcast-{sink.stage}-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pinned_nbytes(self) -> int:
        """Pinned memory that this end holds."""
        return self._staging.pinned_nbytes + self._trailers.pinned_nbytes

    @property
    def stage(self) -> Stage:
        """The sink's stage: what the loop waits for when it waits here."""
        return self._sink.stage

    def drain(self, chunk: Chunk, slot: Slot) -> None:
        """Give the chunk to the drain lane, and each piece to the threads once it is copied."""
        ring = self._ring
        self._raise_failure()
        with ring.drain:
            ring.drain.wait(slot.arrived)
            begin = ring.drain.mark()
            pieces = list(pieces_of(chunk, self._piece_nbytes))
            offset = chunk.trailer_offset
            trailer = self._lease(self._trailers, chunk, offset, chunk.trailer_nbytes)
            trailer.copy_from(slot, offset)
            arrival = _Arrival(chunk, trailer, len(pieces))
            for piece in pieces:
                lease = self._lease(self._staging, chunk, piece.slot_offset, piece.nbytes)
                lease.copy_from(slot, piece.slot_offset)
                slot.drained = ring.drain.mark()
                self._queue.put((arrival, piece, lease, slot.drained))
        self._counters.newest = pieces[-1].extents[-1]
        if not ring.is_host and slot.drained is not None:
            ring.clock.span("d2h", chunk.index, chunk.nbytes, begin, slot.drained)

    def finish(self) -> None:
        """Block until every piece is in the sink; raises the first thing that went wrong."""
        self._end_threads()
        with self._counters.waiting_on(self.stage):
            for thread in self._threads:
                thread.join()
        self._raise_failure()

    def close(self) -> None:
        """End the threads; after a failure what is queued is dropped."""
        over = TransferError("the transfer is over")
        self._staging.close(over)
        self._trailers.close(over)
        self._failure = self._failure or over
        self._end_threads()
        join_all(self._threads, CLOSE_LIMIT_S)

    def _end_threads(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _lease(self, staging: Staging, chunk: Chunk, offset: int, nbytes: int) -> Lease:
        begin = time.perf_counter()
        lease = staging.lease(chunk, offset, nbytes)
        self._counters.waited(self._held_up_by, time.perf_counter() - begin)
        return lease

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            arrival, piece, lease, mark = item
            try:
                if self._failure is None:
                    use_device(self._ring.device)
                    begin = time.perf_counter()
                    mark.synchronize()
                    copied = time.perf_counter()
                    self._land(arrival, piece, lease)
                    landing_s = time.perf_counter() - copied
                    self._held_up_by = self.stage if landing_s > copied - begin else "d2h"
            except Exception as error:
                self._fail(as_packcast_error(error, self.stage))
            finally:
                lease.release()
                arrival.piece_done()

    def _land(self, arrival: _Arrival, piece: Piece, lease: Lease) -> None:
        begin = time.perf_counter()
        promised = self._promised(arrival)[piece.first_block * DIGEST_NBYTES :]
        view = lease.view
        for extent in piece.extents:
            part, view = view[: extent.nbytes], view[extent.nbytes :]
            found = block_digests(part)
            expected, promised = promised[: len(found)], promised[len(found) :]
            if found != expected and not self._tolerant:
                raise TransferError(self._damage(arrival.chunk, extent, found, expected))
            self._sink.put(extent.file, extent.offset, part)
            # Without their trailer's word even right bytes are not proven.
            self.digests.record(extent, found if expected else bytes(len(found)))
        self._counters.add(
            self.stage, arrival.chunk.index, piece.nbytes, begin, time.perf_counter()
        )

    def _promised(self, arrival: _Arrival) -> bytes:
        try:
            return arrival.digests(self._tag)
        except TransferError:
            if not self._tolerant:
                raise
            return b""

    def _damage(self, chunk: Chunk, extent: Extent, found: bytes, expected: bytes) -> str:
        starts = range(0, len(found), DIGEST_NBYTES)
        same = (
            found[at : at + DIGEST_NBYTES] == expected[at : at + DIGEST_NBYTES] for at in starts
        )
        begin = extent.offset + list(same).index(False) * BLOCK
        end = min(begin + BLOCK, extent.offset + extent.nbytes)
        spec = self._files[extent.file]
        tensor = spec.header.tensor_at(begin) if spec.header else None
        inside = f" (tensor {tensor.name})" if tensor else ""
        return (
            f"{spec.name}: bytes {begin} to {end}{inside} were damaged on the way, "
            f"chunk {chunk.index}"
        )

    def _fail(self, error: PackcastError) -> None:
        if self._failure is None:
            self._failure = error
        # The loop may be waiting for memory that only a healthy sink would give back.
        self._staging.close(error)
