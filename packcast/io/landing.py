"""The receiving end: chunks go from slots through staging to a sink, each block verified.

Every block is compared with its digest in the chunk's trailer before the sink gets it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import ClassVar

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import PackcastError, TransferError
from packcast.io.digests import SEND_AGAIN, BlockDigests
from packcast.io.files import Resources
from packcast.io.schedule import Schedule, ScheduledUnit, Span
from packcast.io.staging import Buffers, Staging
from packcast.io.unit_runner import UnitRunner
from packcast.io.work import Failure, FailureKind, Task
from packcast.packed.counters import Stage
from packcast.packed.plan import BLOCK, DIGEST_NBYTES, Chunk, Extent
from packcast.packed.ring import Slot
from packcast.packed.streams import Completion
from packcast.packed.trailer import read_trailer


class Sink:
    """Where a worker's bytes go: write, verify, tensors, discard. The steps do nothing by default.

    `stage` is the name under which its work is counted; `task` is what the I/O threads do with each
    verified block.
    """

    stage: ClassVar[Stage]
    task: ClassVar[Task]

    def __init__(self) -> None:
        self.notes: list[str] = []  # warnings of a successful transfer

    def prepare(self) -> None:
        """Before READY: check and reserve; raises DestinationError or CheckpointError."""

    def spans(self, extent: Extent) -> Iterable[Span]:
        """The runs of files that `task` is about; after `prepare`, before any byte comes."""
        return ()

    def open_files(self, schedule: Schedule) -> Resources:
        """The resources of the spans; called after `spans`."""
        return Resources()

    def error_of(self, failure: Failure, span: Span) -> PackcastError:
        """The error for a failed system call on a span; Landing reports damaged blocks."""
        return TransferError(f"{self.stage} failed: {failure.reason}")

    def compared(self, span: Span, offset: int) -> None:
        """A span of a file differs, first at byte `offset` of it; before `finish`."""

    def finish(self) -> None:
        """After the last byte: make it durable."""

    def publish(self) -> None:
        """After COMMIT: make it appear."""

    def abort(self) -> None:
        """Leave nothing behind; from any thread, at any time before `publish`."""

    def result(self) -> dict[str, object]:
        """The facts for the report."""
        return {"sink": self.stage}


class UnitEvent:
    """A point in time that has passed once a unit is done; as a stream's event, for the host."""

    cuda_event = None
    passed_at = 0.0

    def __init__(self, runner: UnitRunner, unit: int) -> None:
        self._runner = runner
        self._unit = unit

    def passed(self) -> bool:
        """Whether the unit is done; raises why it will not be."""
        return self._runner.is_done(self._unit)

    def synchronize(self) -> None:
        """Block until it is done; raises why it will not be."""
        self._runner.wait(self._unit)


class Landing:
    """Takes chunks out of slots; I/O threads put their blocks into `sink`.

    A damaged block raises; with `tolerant`, `digests` show what arrived instead.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        sink: Sink,
        files: Sequence[FileSpec],
        buffers: Buffers,
        *,
        num_threads: int,
        tolerant: bool = False,
    ) -> None:
        self._chunks = chunks
        self._sink = sink
        self.stage: Stage = sink.stage  # what the loop waits for when it waits here
        self._tolerant = tolerant
        self._files = files
        self._ring = buffers.ring
        self._counters = buffers.ring.counters
        self._tag = buffers.tag
        self._staging = Staging(buffers)
        self.pinned_nbytes = self._staging.pinned_nbytes
        self._runner = UnitRunner(
            sink.task,
            sink.stage,
            chunks,
            self._staging,
            spans_of=sink.spans,
            resources_of=sink.open_files,
            error_of=partial(_error_of, sink, files),
            num_threads=num_threads,
            counters=self._counters,
            tolerant=tolerant,
        )
        self._copies: deque[tuple[ScheduledUnit, Completion]] = deque()  # into staging, under way

    def drain(self, chunk: Chunk, slot: Slot) -> None:
        """Give the chunk to the drain stream, and each unit to the sink once it is copied."""
        ring, begin = self._ring, None
        units = self._runner.units[chunk.index]
        for unit in units:
            self._await_place(unit)
            with ring.drain:
                ring.drain.wait(slot.arrived)
                begin = begin or ring.drain.record()
                if unit is units[0]:
                    self._staging.copy_trailer_from(slot, unit)
                self._staging.copy_from(slot, unit)
                event = slot.drained = ring.drain.record()
            self._copies.append((unit, event))
            self._pass_on()
        self._counters.newest = chunk.extents[-1]
        if ring.is_host:
            slot.drained = UnitEvent(self._runner, units[-1].index)
        elif begin and slot.drained:
            ring.clock.span("d2h", chunk.index, chunk.nbytes, begin, slot.drained)

    def finish(self) -> None:
        """Block until every byte is in the sink; raises the first thing that went wrong."""
        with self._counters.waiting_on(self.stage):
            self._runner.wait(len(self._runner.schedule.units) - 1, self._pass_on)
        for index, offset in enumerate(self._runner.differences):
            if offset >= 0:
                self._sink.compared(self._runner.schedule.span(index), offset)

    def digests(self) -> BlockDigests:
        """Of every block that came, once all are through; after `finish`."""
        digests = BlockDigests([spec.nbytes for spec in self._files])
        digests.record(self._chunks, self._runner.digests)
        return digests

    def close(self) -> None:
        """End the threads; after a failure unfinished units are dropped."""
        self._runner.close(self._ring)

    def _await_place(self, unit: ScheduledUnit) -> None:
        """Wait until the unit that had its place in staging before is done."""
        before = unit.index - self._staging.num_units
        if before < self._runner.num_done:
            return
        self._pass_on()
        # Units that are not allowed yet wait for their copy; the sink may be idle.
        stage: Stage = self.stage if before < self._runner.num_allowed else "d2h"
        with self._counters.waiting_on(stage):
            self._runner.wait(before, self._pass_on)

    def _pass_on(self) -> None:
        """Let the I/O threads at the units whose copies are over."""
        num_copied = self._runner.num_allowed
        while self._copies and self._copies[0][1].passed():
            unit, _ = self._copies.popleft()
            if unit.slot_offset == 0:
                self._take_promised_digests(unit)
            num_copied = unit.index + 1
        self._runner.allow(num_copied)

    def _take_promised_digests(self, first: ScheduledUnit) -> None:
        """Those of the chunk of which this is the first unit, from its trailer."""
        chunk, begin = first.chunk, first.blocks.start
        num_blocks = self._runner.units[chunk.index][-1].blocks.stop - begin
        page = self._staging.view(self._staging.trailer_offset(first), chunk.trailer_nbytes)
        try:
            digests = read_trailer(page, self._tag, chunk, num_blocks)
        except TransferError:
            if not self._tolerant:
                raise
            digests = bytes(DIGEST_NBYTES * num_blocks)  # without its digests nothing is verified
        at = begin * DIGEST_NBYTES
        self._runner.digests[at : at + len(digests)] = digests


def _error_of(
    sink: Sink, files: Sequence[FileSpec], schedule: Schedule, failure: Failure
) -> PackcastError:
    """What kept a unit from being done. No method: the runner has it, and is the landing's own."""
    if failure.kind is not FailureKind.DAMAGED:
        return sink.error_of(failure, schedule.span(failure.span))
    unit_index, memory, *_ = schedule.piece(failure.piece)
    unit = schedule.units[unit_index]
    at = unit.slot_offset + memory - unit.memory_offset + failure.offset
    ends = list(accumulate(extent.nbytes for extent in unit.chunk.extents))
    extent = unit.chunk.extents[bisect_right(ends, at)]
    end_of_extent = extent.offset + extent.nbytes
    begin = end_of_extent - (ends[bisect_right(ends, at)] - at)
    end = min(begin + BLOCK, end_of_extent)
    spec = files[extent.file]
    tensor = spec.header.tensor_at(begin) if spec.header else None
    inside = f" (tensor {tensor.name})" if tensor else ""
    return TransferError(
        f"{spec.name}: bytes {begin} to {end}{inside} were damaged in transit, "
        f"chunk {unit.chunk.index}",
        hint=SEND_AGAIN,
    )
