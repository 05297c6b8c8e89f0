"""The consumer's end: chunks go from slots through staging to a sink, each block proven on the way.

Every block is compared with its digest in the chunk's trailer before anything is done with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from packcast.checkpoint.outgoing import FileSpec
from packcast.ends.digests import BlockDigests
from packcast.ends.hands import CLOSE_LIMIT_S, Order, join_all
from packcast.ends.staging import Buffers, Lease, make_hands, make_staging, use_device
from packcast.ends.work import Job, Outcome, Span, Task
from packcast.errors import PackcastError, TransferError, as_packcast_error
from packcast.packed.counters import Stage
from packcast.packed.lanes import Mark
from packcast.packed.plan import (
    BLOCK,
    DIGEST_NBYTES,
    Chunk,
    Extent,
    Piece,
    Unit,
    num_blocks,
    pieces_of,
    units_of,
)
from packcast.packed.ring import Slot
from packcast.packed.trailer import read_trailer

_NOTICED_S = 0.001  # a wait that is longer was one


class Sink(Protocol):
    """Where a worker's bytes go: write, verify, discard."""

    notes: list[str]  # what a person should know although it went well

    @property
    def stage(self) -> Stage:
        """The name under which its work is counted."""

    @property
    def task(self) -> Task:
        """What is done with each proven block."""

    def prepare(self) -> None:
        """Before READY: check and reserve; raises DestinationError or CheckpointError."""

    def lend(self, extent: Extent) -> tuple[Span, ...]:
        """The parts of files that `task` is about, good until `take`; many threads."""

    def take(
        self, extent: Extent, spans: tuple[Span, ...], data: memoryview, outcome: Outcome
    ) -> None:
        """`task` was done, or not, as `outcome` says; once for each `lend`, many threads.

        Raises what went wrong with the sink's files; damage on the way is not its concern.
        """

    def finish(self) -> None:
        """After the last `take`: make it durable."""

    def publish(self) -> None:
        """After COMMIT: make it appear."""

    def abort(self) -> None:
        """Leave nothing behind; from any thread, at any time before `publish`."""

    def result(self) -> dict[str, object]:
        """What there is to report."""


class _Arrival:
    """A received chunk; its digests are there once its last unit is."""

    __slots__ = ("chunk", "digests")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.digests = b""


class _Stay:
    """A unit's stay in staging, which ends when the last of its users has done with it."""

    __slots__ = ("_lock", "_num_users", "arrival", "lease", "mark", "unit")

    def __init__(self, arrival: _Arrival, unit: Unit, lease: Lease, mark: Mark) -> None:
        self.arrival = arrival
        self.unit = unit
        self.lease = lease
        self.mark = mark  # the copy into it
        self._num_users = 1  # who hands out its pieces
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            self._num_users += 1

    def leave(self) -> None:
        with self._lock:
            self._num_users -= 1
            is_last = self._num_users == 0
        if is_last:
            self.lease.release()


class Landing:
    """Takes chunks out of slots and has their blocks put into `sink`, by `num_hands` hands.

    A damaged block ends it; a `tolerant` one goes on, and `digests` tell what came.
    """

    def __init__(
        self,
        sink: Sink,
        files: Sequence[FileSpec],
        buffers: Buffers,
        *,
        num_hands: int,
        tolerant: bool = False,
    ) -> None:
        self.digests = BlockDigests([spec.nbytes for spec in files])
        self._sink = sink
        self._tolerant = tolerant
        self._held_up_by: Stage = sink.stage
        self._files = files
        self._ring = buffers.ring
        self._counters = buffers.ring.counters
        self._tag = buffers.tag
        self._staging = make_staging(buffers)
        self._hands = make_hands(buffers, self._staging, num_hands, sink.stage)
        self._queue: SimpleQueue[_Stay | None] = SimpleQueue()
        self._failure: PackcastError | None = None
        self._num_jobs = 0
        self._changed = threading.Condition()
        self._feeder = threading.Thread(
            target=self._feed, name=f"packcast-{sink.stage}", daemon=True
        )
        self._feeder.start()

    @property
    def pinned_nbytes(self) -> int:
        """Pinned memory that this end holds."""
        return self._staging.pinned_nbytes

    def await_ready(self) -> None:
        """Block until its hands are there, a moment."""
        self._hands.await_ready()

    @property
    def stage(self) -> Stage:
        """The sink's stage: what the loop waits for when it waits here."""
        return self._sink.stage

    def drain(self, chunk: Chunk, slot: Slot) -> None:
        """Give the chunk to the drain lane, and each unit to the sink once it is copied."""
        ring, arrival, begin = self._ring, _Arrival(chunk), None
        self._raise_failure()
        # From the last one on, which has the trailer: without it nothing can be done with others,
        # and they may need each other's staging.
        for unit in reversed(list(units_of(chunk, self._staging.unit_nbytes))):
            waited_since = time.perf_counter()
            lease = self._staging.lease(chunk, unit.slot_offset, unit.nbytes)
            self._counters.waited(self._held_up_by, time.perf_counter() - waited_since)
            with ring.drain:
                ring.drain.wait(slot.arrived)
                begin = begin or ring.drain.mark()
                lease.copy_from(slot, unit.slot_offset)
                slot.drained = ring.drain.mark()
            self._queue.put(_Stay(arrival, unit, lease, slot.drained))
        self._counters.newest = chunk.extents[-1]
        if not ring.is_host and begin and slot.drained:
            ring.clock.span("d2h", chunk.index, chunk.nbytes, begin, slot.drained)

    def finish(self) -> None:
        """Block until every piece is in the sink; raises the first thing that went wrong."""
        self._queue.put(None)
        with self._counters.waiting_on(self.stage):
            self._feeder.join()
            with self._changed:
                self._changed.wait_for(lambda: self._failure or not self._num_jobs)
        self._raise_failure()

    def close(self) -> None:
        """End the threads; after a failure what is queued is dropped."""
        self._fail(TransferError("the transfer is over"))
        self._queue.put(None)
        self._hands.close()
        join_all([self._feeder], CLOSE_LIMIT_S)
        self._staging.free(self._ring)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _feed(self) -> None:
        """Hand out the pieces of each unit as soon as it has been copied."""
        use_device(self._ring.device)
        while (stay := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    waited_since = time.perf_counter()
                    stay.mark.synchronize()
                    # Staging is full of what waits for its copy, while the sink has nothing to do.
                    starved = time.perf_counter() - waited_since > _NOTICED_S and not self._num_jobs
                    self._held_up_by = "d2h" if starved else self.stage
                    self._hand_out(stay)
            except Exception as error:
                self._fail(as_packcast_error(error, self.stage))
            finally:
                stay.leave()

    def _hand_out(self, stay: _Stay) -> None:
        arrival, unit, chunk = stay.arrival, stay.unit, stay.arrival.chunk
        if unit.is_last:
            page = stay.lease.view[chunk.trailer_offset - unit.slot_offset :]
            blocks = sum(num_blocks(extent.nbytes) for extent in chunk.extents)
            arrival.digests = self._read_trailer(page, chunk, blocks)
            # Those of a unit are the last ones of what the units handed out before have left.
        at = len(arrival.digests) - DIGEST_NBYTES * sum(
            num_blocks(extent.nbytes) for extent in unit.extents
        )
        mine, arrival.digests = arrival.digests[at:], arrival.digests[:at]
        orders: list[Order] = []
        try:
            for piece in pieces_of(unit):
                nbytes = DIGEST_NBYTES * num_blocks(piece.extent.nbytes)
                promised, mine = mine[:nbytes], mine[nbytes:]
                orders.append(self._order(stay, piece, promised))
        finally:
            self._hands.submit(orders)  # what has been lent comes back, whatever happens

    def _read_trailer(self, page: memoryview, chunk: Chunk, blocks: int) -> bytes:
        try:
            return read_trailer(page, self._tag, chunk, blocks)
        except TransferError:
            if not self._tolerant:
                raise
            return bytes(DIGEST_NBYTES * blocks)  # without its word nothing is proven

    def _order(self, stay: _Stay, piece: Piece, promised: bytes) -> Order:
        extent = piece.extent
        memory = stay.lease.view[piece.at : piece.at + extent.nbytes]
        spans = self._sink.lend(extent)
        job = Job(self._sink.task if spans else Task.CHECK, extent.nbytes, spans, promised)
        stay.enter()
        with self._changed:
            self._num_jobs += 1
        return job, memory, partial(self._landed, stay, extent, job, memory)

    def _landed(
        self, stay: _Stay, extent: Extent, job: Job, memory: memoryview, outcome: Outcome
    ) -> None:
        chunk = stay.arrival.chunk
        try:
            self._sink.take(extent, job.spans, memory, outcome)
            if outcome.error:
                raise outcome.error
            if outcome.damaged_block is None:
                self.digests.record(extent, job.digests)
            elif not self._tolerant:
                raise TransferError(self._damage(chunk, extent, outcome.damaged_block))
            end = time.perf_counter()
            self._counters.add(self.stage, chunk.index, extent.nbytes, end - outcome.seconds, end)
        except Exception as error:
            self._fail(as_packcast_error(error, self.stage))
        finally:
            stay.leave()
            with self._changed:
                self._num_jobs -= 1
                if not self._num_jobs:
                    self._changed.notify_all()

    def _damage(self, chunk: Chunk, extent: Extent, block: int) -> str:
        begin = extent.offset + block * BLOCK
        end = min(begin + BLOCK, extent.offset + extent.nbytes)
        spec = self._files[extent.file]
        tensor = spec.header.tensor_at(begin) if spec.header else None
        inside = f" (tensor {tensor.name})" if tensor else ""
        return (
            f"{spec.name}: bytes {begin} to {end}{inside} were damaged on the way, "
            f"chunk {chunk.index}"
        )

    def _fail(self, error: PackcastError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        # The loop may be waiting for memory that only a healthy sink would give back.
        self._staging.close(error)
