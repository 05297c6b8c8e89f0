"""The producer's end: outgoing files are read by I/O threads, ahead of the loop, into staging.

Reads by `pread`, never by mapping: a file that is cut short while it is read is then an error, not
the death of the process.
"""

from __future__ import annotations

import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate

from packcast.checkpoint.outgoing import Literal, OutgoingFile, SourceRun
from packcast.checkpoint.reading import open_without_links, read_exactly
from packcast.checkpoint.sourcefile import SourceFile
from packcast.errors import CheckpointError, PackcastError, out_of_descriptors
from packcast.io.copies import LOOK_EVERY_S, Copies, make_copies
from packcast.io.digests import BlockDigests
from packcast.io.files import FileTable
from packcast.io.schedule import IN_MEMORY, ScheduledUnit, Span
from packcast.io.staging import Buffers, Staging
from packcast.io.unit_runner import UnitRunner
from packcast.io.work import Failure, FailureKind, Task
from packcast.packed.counters import Stage
from packcast.packed.plan import DIGEST_NBYTES, Chunk, Extent
from packcast.packed.ring import Slot
from packcast.packed.trailer import write_trailer

_CHANGED_HINT = "nothing was published; send it again when no process writes to the checkpoint"


class FileReader:
    """The source files of outgoing files: the position of each run, and errors of reading."""

    def __init__(self, files: Sequence[OutgoingFile], sources: Sequence[SourceFile]) -> None:
        self._files = files
        self._sources = sources
        self._begins = [  # of each file's segments, to find the one a byte is in
            list(accumulate((segment.nbytes for segment in file.segments), initial=0))
            for file in files
        ]
        self._literals: dict[int, array[int]] = {}  # by identity; copies, whose address is known

    @property
    def file_nbytes(self) -> list[int]:
        """The sizes of the outgoing files."""
        return [file.spec.nbytes for file in self._files]

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Fill `into` with the outgoing file's bytes from `offset`, in this thread."""
        at = 0
        for segment, skip, nbytes in self._parts(Extent(file, offset, len(into))):
            part = into[at : at + nbytes]
            if isinstance(segment, Literal):
                part[:] = segment.data[skip : skip + nbytes]
            else:
                fd = self._open(segment.source)
                try:
                    where = self._sources[segment.source].name
                    part[:] = read_exactly(fd, nbytes, segment.offset + skip, where)
                finally:
                    os.close(fd)
            at += nbytes

    def spans(self, extent: Extent) -> Iterator[Span]:
        """Where the extent's bytes come from; a span's file is a source, or memory."""
        at = 0
        for segment, skip, nbytes in self._parts(extent):
            if isinstance(segment, Literal):
                yield Span(IN_MEMORY, self._address(segment) + skip, at, nbytes)
            else:
                yield Span(segment.source, segment.offset + skip, at, nbytes)
            at += nbytes

    def open_files(self) -> FileTable:
        """The sources, for I/O threads; each is seen to be unchanged when opened and at its end."""
        return FileTable(len(self._sources), self._open, self._close)

    def error_of(self, failure: Failure, span: Span) -> PackcastError:
        """What kept a span from being read."""
        source = self._sources[span.file]
        name = source.name
        if failure.kind is FailureKind.END_OF_FILE:
            end = failure.offset  # of the thread that met it first, which may be beyond it
            with suppress(OSError):
                end = min(end, os.stat(source.path).st_size)
            message = f"{name} ended at byte {end} while it was being sent"
            return CheckpointError(message, hint=_CHANGED_HINT)
        return CheckpointError(f"{name}: reading failed: {failure.reason}")

    def _parts(self, extent: Extent) -> Iterator[tuple[Literal | SourceRun, int, int]]:
        """The segments that the extent lies in: how much of each to skip, how much to take."""
        begins, segments = self._begins[extent.file], self._files[extent.file].segments
        at, end = extent.offset, extent.offset + extent.nbytes
        i = bisect_right(begins, at) - 1
        while at < end:
            skip = at - begins[i]
            nbytes = min(segments[i].nbytes - skip, end - at)
            yield segments[i], skip, nbytes
            at, i = at + nbytes, i + 1

    def _address(self, literal: Literal) -> int:
        copy = self._literals.setdefault(id(literal), array("B", literal.data))
        return copy.buffer_info()[0]

    def _open(self, source: int) -> int:
        known = self._sources[source]
        try:
            fd = open_without_links(known.path)
        except OSError as error:
            if ran_out := out_of_descriptors(error):
                raise ran_out from error
            raise CheckpointError(f"{known.name}: cannot be opened: {error.strerror}") from error
        try:
            self._check_unchanged(source, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _close(self, source: int, fd: int) -> None:
        try:
            self._check_unchanged(source, fd)
        finally:
            os.close(fd)

    def _check_unchanged(self, source: int, fd: int) -> None:
        self._sources[source].check_unchanged(os.fstat(fd), "sent", _CHANGED_HINT)


class FileSource:
    """Fills slots from outgoing files.

    Staging limits how far it reads ahead beside a GPU; the slots do on a CPU.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        reader: FileReader,
        buffers: Buffers,
        *,
        num_threads: int,
    ) -> None:
        self._chunks = chunks
        self._reader = reader
        self._ring = buffers.ring
        self._counters = buffers.ring.counters
        self._tag = buffers.tag
        self._files = reader.open_files()
        self._staging = Staging(buffers)
        self.pinned_nbytes = self._staging.pinned_nbytes
        self._runner = UnitRunner(
            Task.READ,
            "read",
            chunks,
            self._staging,
            spans_of=reader.spans,
            resources_of=lambda _: self._files,
            error_of=lambda schedule, it: reader.error_of(it, schedule.span(it.span)),
            num_threads=num_threads,
            counters=self._counters,
        )
        self._copies: Copies | None = None
        if not self._staging.is_slots:
            try:
                self._copies = make_copies(self._runner, self._staging, self._ring)
            except BaseException:
                self.close()
                raise
        self._look_at = 0.0
        self._is_sending = False

    def read_ahead(self) -> None:
        """Before the loop: begin to read, as far as there is staging; no slot is in use yet."""
        room = self._staging.num_units
        if self._staging.is_slots:
            room = sum(chunk.index < room for chunk in self._chunks)
        self._runner.allow(room)

    def begin(self, chunk: Chunk) -> None:
        """On a CPU: the chunk has its slot, which may be read into from now on."""
        self._runner.allow(self._runner.units[chunk.index][-1].index + 1)

    def fill(self, chunk: Chunk, slot: Slot) -> None:
        """Give the chunk and its trailer to the fill stream, each unit as soon as it was read."""
        ring, units = self._ring, self._runner.units[chunk.index]
        with ring.fill:
            if self._copies is None:
                self._wait(chunk)
                self._write_trailer(chunk, units)
                slot.filled = ring.fill.record()
            else:
                trailer = partial(self._write_trailer, chunk, units)
                begin = self._copies.copy(units, slot, trailer, self._look)
                slot.filled = ring.fill.record()
                ring.clock.span("h2d", chunk.index, chunk.nbytes, begin, slot.filled)
        self._counters.newest = chunk.extents[-1]

    def digests(self) -> BlockDigests:
        """Of every block of its chunks, once all are through."""
        digests = BlockDigests(self._reader.file_nbytes)
        digests.record(self._chunks, self._runner.digests)
        return digests

    def close(self) -> None:
        """End the threads and close the files."""
        self._runner.close(self._ring)
        self._files.close()

    def _wait(self, chunk: Chunk) -> None:
        """On a CPU, until the chunk's only unit was read into its slot."""
        self.begin(chunk)
        with self._counters.waiting_on("read"):
            self._look("read")
            unit = self._runner.units[chunk.index][-1].index
            self._runner.wait(unit, lambda: self._look("read"), every_s=LOOK_EVERY_S)

    def _look(self, stage: Stage) -> None:
        """While the loop waits for `stage`: that is not what holds it up as long as the network
        is busy with earlier chunks."""
        now = time.perf_counter()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._ring.clock.collect()  # or nothing sent would be counted until the wait is over
            self._is_sending = self._ring.is_sending()
        self._counters.standing = "broadcast" if self._is_sending else stage

    def _write_trailer(self, chunk: Chunk, units: Sequence[ScheduledUnit]) -> None:
        first, last = units[0], units[-1]
        begin, end = first.blocks.start * DIGEST_NBYTES, last.blocks.stop * DIGEST_NBYTES
        at = last.memory_offset + chunk.trailer_offset - last.slot_offset
        into = self._staging.view(at, chunk.trailer_nbytes)
        write_trailer(into, self._tag, chunk, bytes(self._runner.digests[begin:end]))
