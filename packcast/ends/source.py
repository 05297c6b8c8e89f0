"""The producer's end: outgoing files are read piece by piece, ahead of the loop, into staging.

Reads by `preadv`, never by mapping: a file that is cut short while it is read is then an error,
not the death of the process. Digests are taken while a block is still in the cache.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from queue import SimpleQueue

from packcast.checkpoint.checkpoint import SourceFile
from packcast.checkpoint.outgoing import Literal, OutgoingFile, Run
from packcast.ends.descriptors import Descriptors, open_files_limit
from packcast.ends.digests import BlockDigests
from packcast.ends.hands import CLOSE_LIMIT_S, Order, join_all
from packcast.ends.staging import Buffers, Lease, make_hands, make_staging, use_device
from packcast.ends.work import Job, Outcome, Span, Task, perform
from packcast.errors import (
    CheckpointError,
    PackcastError,
    TransferError,
    as_packcast_error,
    out_of_descriptors,
)
from packcast.packed.plan import (
    DIGEST_NBYTES,
    Chunk,
    Extent,
    Unit,
    num_blocks,
    pieces_of,
    units_of,
)
from packcast.packed.ring import Slot
from packcast.packed.trailer import write_trailer

_CHANGED_HINT = "nothing was published; run again once it is quiet"


class FileReader:
    """Reads any run of an outgoing file's bytes, from many threads; a bounded number is open."""

    def __init__(self, files: Sequence[OutgoingFile], sources: Sequence[SourceFile]) -> None:
        self._files = files
        self._sources = sources
        self._begins = [  # of each file's segments, to find the one a byte is in
            list(accumulate((segment.nbytes for segment in file.segments), initial=0))
            for file in files
        ]
        self._descriptors = Descriptors(self._open, open_files_limit(len(sources)))

    @property
    def file_nbytes(self) -> list[int]:
        """The sizes of the outgoing files."""
        return [file.spec.nbytes for file in self._files]

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Fill `into` with the outgoing file's bytes from `offset`, in this thread."""
        extent = Extent(file, offset, len(into))
        job = self.job(extent, into)
        self.check(extent, job, perform(job, into))

    def job(self, extent: Extent, into: memoryview) -> Job:
        """How the extent's bytes come to lie in `into`; what is in no source is there already.

        Its files stay open until `check`.
        """
        begins, segments = self._begins[extent.file], self._files[extent.file].segments
        lent: list[int] = []
        spans, at = [], 0
        i = bisect_right(begins, extent.offset) - 1
        try:
            while at < extent.nbytes:
                segment, skip = segments[i], extent.offset + at - begins[i]
                nbytes = min(segment.nbytes - skip, extent.nbytes - at)
                if isinstance(segment, Literal):
                    into[at : at + nbytes] = segment.data[skip : skip + nbytes]
                else:
                    descriptor = self._descriptors.lend(segment.source)
                    lent.append(segment.source)
                    spans.append(Span(descriptor, segment.offset + skip, at, nbytes))
                at, i = at + nbytes, i + 1
        except BaseException:
            for source in lent:
                self._descriptors.give_back(source)
            raise
        return Job(Task.READ, extent.nbytes, tuple(spans))

    def check(self, extent: Extent, job: Job, outcome: Outcome) -> None:
        """Take its files back; raise what went wrong with the job, if anything did."""
        for span in job.spans:
            self._descriptors.give_back(self._segment(extent, span).source)
        if outcome.error:
            raise outcome.error
        failure = outcome.failure
        if failure is None:
            return
        name = self._sources[self._segment(extent, job.spans[failure.span]).source].name
        if failure.errno:
            raise CheckpointError(f"{name}: reading failed: {failure.error.strerror}")
        raise CheckpointError(f"{name} ended at byte {failure.offset} while it was being sent")

    def close_file(self, file: int) -> None:
        """Every byte of the outgoing file was read: see that its sources have not changed."""
        for source in {s.source for s in self._files[file].segments if not isinstance(s, Literal)}:
            with self._descriptors.borrow(source) as descriptor:
                self._check_unchanged(source, descriptor)

    def close(self) -> None:
        """Close what is still open, unchecked; no read may be under way."""
        self._descriptors.close()

    def _segment(self, extent: Extent, span: Span) -> Run:
        i = bisect_right(self._begins[extent.file], extent.offset + span.at) - 1
        segment = self._files[extent.file].segments[i]
        assert isinstance(segment, Run)
        return segment

    def _open(self, source: int) -> int:
        known = self._sources[source]
        try:
            descriptor = os.open(known.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if ran_out := out_of_descriptors(error):
                raise ran_out from error
            raise CheckpointError(f"{known.name}: cannot be opened: {error.strerror}") from error
        try:
            self._check_unchanged(source, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_unchanged(self, source: int, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self._sources[source].check_unchanged(found, "sent", _CHANGED_HINT)


class _Load:
    """One unit on its way from files to slot."""

    __slots__ = ("_left", "_lock", "digests", "error", "lease", "ready", "unit")

    def __init__(self, unit: Unit, lease: Lease) -> None:
        self.unit = unit
        self.lease = lease
        num_blocks_ = sum(num_blocks(extent.nbytes) for extent in unit.extents)
        self.digests = bytearray(num_blocks_ * DIGEST_NBYTES)
        self.error: PackcastError | None = None
        self.ready = threading.Event()
        self._left = sum(extent.nbytes for extent in unit.extents)
        self._lock = threading.Lock()

    def piece_read(self, nbytes: int) -> None:
        with self._lock:
            self._left -= nbytes
            is_last = self._left == 0
        if is_last:
            self.ready.set()

    def fail(self, error: PackcastError) -> None:
        self.error = error
        self.ready.set()


class FileSource:
    """Fills slots from outgoing files.

    Beside a GPU `staging_nbytes` bounds how far it reads ahead; on a CPU the ring does.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        reader: FileReader,
        buffers: Buffers,
        *,
        num_hands: int,
    ) -> None:
        self.digests = BlockDigests(reader.file_nbytes)
        self._reader = reader
        self._ring = buffers.ring
        self._counters = buffers.ring.counters
        self._tag = buffers.tag
        self._staging = make_staging(buffers)
        self._hands = make_hands(buffers, self._staging, num_hands, "read")
        self._unread: dict[int, int] = {}
        for chunk in chunks:
            for extent in chunk.extents:
                self._unread[extent.file] = self._unread.get(extent.file, 0) + extent.nbytes
        self._unread_lock = threading.Lock()
        self._loads: SimpleQueue[_Load | PackcastError] = SimpleQueue()
        self._stopped = False
        self._feeder = threading.Thread(
            target=self._feed, args=(chunks,), name="packcast-read", daemon=True
        )
        self._feeder.start()

    @property
    def pinned_nbytes(self) -> int:
        """Pinned memory that this end holds."""
        return self._staging.pinned_nbytes

    def await_ready(self) -> None:
        """Block until its hands are there, a moment."""
        self._hands.await_ready()

    def fill(self, chunk: Chunk, slot: Slot) -> None:
        """Give the chunk and its trailer to the fill lane, each unit as soon as it was read."""
        ring, digests, begin = self._ring, bytearray(), None
        is_last = False
        with ring.fill:
            while not is_last:
                load = self._await_load()
                unit, lease, is_last = load.unit, load.lease, load.unit.is_last
                digests += load.digests
                if is_last:
                    trailer = lease.view[chunk.trailer_offset - unit.slot_offset :]
                    write_trailer(trailer, self._tag, chunk, bytes(digests))
                begin = begin or ring.fill.mark()
                lease.copy_to(slot, unit.slot_offset)
                slot.filled = ring.fill.mark()
                lease.release(slot.filled)
        self._counters.newest = chunk.extents[-1]
        if not ring.is_host and begin and slot.filled:
            ring.clock.span("h2d", chunk.index, chunk.nbytes, begin, slot.filled)

    def close(self) -> None:
        """End the threads and close the files."""
        self._stopped = True
        self._staging.close(TransferError("the transfer is over"))
        self._hands.close()
        if join_all([self._feeder], CLOSE_LIMIT_S):
            self._reader.close()
        self._staging.free(self._ring)

    def _await_load(self) -> _Load:
        # No piece has been begun: beside a GPU staging is full of what waits for its copy.
        with self._counters.waiting_on("read" if self._ring.is_host else "h2d"):
            load = self._loads.get()
        if isinstance(load, PackcastError):
            raise load
        if not load.ready.is_set():
            with self._counters.waiting_on("read"):
                load.ready.wait()
        if load.error is not None:
            raise load.error
        return load

    def _feed(self, chunks: Sequence[Chunk]) -> None:
        """Lend staging to units, in chunk order, and have their pieces read."""
        try:
            use_device(self._ring.device)
            for chunk in chunks:
                for unit in units_of(chunk, self._staging.unit_nbytes):
                    if self._stopped:  # the loop may still be waiting for what comes next
                        raise TransferError("the transfer is over")
                    lease = self._staging.lease(chunk, unit.slot_offset, unit.nbytes)
                    load = _Load(unit, lease)
                    self._loads.put(load)
                    self._have_read(chunk, load)
        except Exception as error:
            self._loads.put(as_packcast_error(error, "reading"))

    def _have_read(self, chunk: Chunk, load: _Load) -> None:
        orders: list[Order] = []
        begin = 0
        try:
            for piece in pieces_of(load.unit):
                extent = piece.extent
                memory = load.lease.view[piece.at : piece.at + extent.nbytes]
                job = self._reader.job(extent, memory)
                done = partial(self._piece_read, chunk.index, load, extent, begin, job)
                orders.append((job, memory, done))
                begin += num_blocks(extent.nbytes) * DIGEST_NBYTES
            self._hands.submit(orders)
        except Exception as error:
            load.fail(as_packcast_error(error, "reading"))

    def _piece_read(
        self, chunk: int, load: _Load, extent: Extent, begin: int, job: Job, outcome: Outcome
    ) -> None:
        try:
            self._reader.check(extent, job, outcome)
            load.digests[begin : begin + len(outcome.digests)] = outcome.digests
            self.digests.record(extent, outcome.digests)
            end = time.perf_counter()
            self._counters.add("read", chunk, extent.nbytes, end - outcome.seconds, end)
            self._count_off(extent.file, extent.nbytes)
            load.piece_read(extent.nbytes)
        except Exception as error:
            load.fail(as_packcast_error(error, "reading"))

    def _count_off(self, file: int, nbytes: int) -> None:
        with self._unread_lock:
            self._unread[file] -= nbytes
            last = self._unread[file] == 0
        if last:
            self._reader.close_file(file)
