"""The sink that makes tensors: runs of files become parts of tensors at a destination.

Knows headers and memory only.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar

from packcast.checkpoint.outgoing import FileSpec
from packcast.checkpoint.reading import shown
from packcast.io.files import Resources
from packcast.io.landing import Sink
from packcast.io.schedule import IN_MEMORY, SPAN_FIELDS, Schedule, ScheduledUnit, Span
from packcast.io.sinks.planned import PlannedTensors
from packcast.io.sinks.tensor_destination import TensorDestination
from packcast.io.work import Task
from packcast.packed.counters import Stage
from packcast.packed.plan import Chunk, Extent

_OFFSET, _NBYTES = 1, 3  # of a span's fields


class TensorSink(Sink, Resources):
    """Puts verified runs of the offered shards into tensors at `destination`; drops sidecars.

    Calls as a sink's: prepare, spans and open_files, finish, publish; abort at any time. On the
    host I/O threads copy into the tensors, chunk by chunk. Where bytes stay on the device,
    DeviceLanding uses `planned` instead. Holds no memory but that of incomplete tensors.
    """

    stage: ClassVar[Stage] = "unpack"
    task = Task.WRITE  # into memory

    def __init__(self, files: Sequence[FileSpec], destination: TensorDestination) -> None:
        Sink.__init__(self)
        Resources.__init__(self)
        self._files = files
        self._destination = destination
        self._lock = threading.Lock()
        self._planned: PlannedTensors | None = None
        self._aborted = False
        self._left_out: set[tuple[int, int]] = set()
        self._keys: list[tuple[int, int]] = []  # by span: file, and the tensor's place in it
        self._spans = array("q")

    @property
    def peak_nbytes(self) -> int:
        """Memory made for tensors that were not whole, the most at a time."""
        return self._destination.peak_nbytes

    def prepare(self) -> None:
        """Raise UsageError if a tensor cannot be received."""
        old = [(file, i) for file, spec in enumerate(self._files) for i in spec.elsewhere]
        self._left_out = {*old, *self._destination.check(self._files)}
        self.notes += _notes(self._files, old, self._left_out)

    def planned(self, chunks: Sequence[Chunk]) -> PlannedTensors:
        """Before READY, after `prepare`: for an end whose chunks land whole and in order. On the
        stream that is to write into the tensors."""
        planned = PlannedTensors(self._files, self._destination, chunks, self._left_out)
        with self._lock:
            self._planned = planned
            if self._aborted:
                planned.stop()
        return planned

    def spans(self, extent: Extent) -> Iterator[Span]:
        """Runs of tensors, on the host; `admit` gives their addresses.

        An empty tensor is in the run that has the byte before it.
        """
        header = self._files[extent.file].header
        tensors = header.tensors if header else ()
        begin, end = extent.offset, extent.offset + extent.nbytes
        index = bisect_right(tensors, begin, key=lambda tensor: tensor.end)
        while index < len(tensors) and (tensors[index].begin < end or tensors[index].end <= end):
            tensor = tensors[index]
            low, high = max(tensor.begin, begin), min(tensor.end, end)
            self._keys.append((extent.file, index))
            yield Span(IN_MEMORY, low - tensor.begin, low - begin, high - low)
            index += 1

    def open_files(self, schedule: Schedule) -> TensorSink:
        """It opens none, but has the memory that spans lead to."""
        self._spans = schedule.spans
        self.planned([unit.chunk for unit in schedule.units])
        return self

    def admit(self, unit: ScheduledUnit, *, is_next: bool) -> bool:
        """Have the memory of every tensor that the chunk has bytes of."""
        assert self._planned is not None, "open_files comes first"
        self._planned.begin(unit.index)
        for span in unit.spans:
            at = SPAN_FIELDS * span
            tensor = self._planned.index_of.get(self._keys[span])
            memory = None if tensor is None else self._planned.memory[tensor]
            if memory is None:
                self._spans[at + _NBYTES] = 0  # not wanted
            else:
                self._spans[at + _OFFSET] += memory.data_ptr()
        return True

    def retire(self, unit: ScheduledUnit) -> None:
        """The chunk is in its tensors; whole tensors go to the destination."""
        assert self._planned is not None, "open_files comes first"
        self._planned.landed(unit.index)

    def finish(self) -> None:
        """After the last run: block until the taker has taken all."""
        self._destination.finish()

    def abort(self) -> None:
        """Wake the thread that waits for the taker; delivered tensors are kept."""
        with self._lock:
            self._aborted = True
        if self._planned is not None:
            self._planned.stop()
        self._destination.stop()

    def result(self) -> dict[str, object]:
        num_complete = 0 if self._planned is None else self._planned.num_complete
        return {"sink": "tensors", "tensors": num_complete}


def _notes(
    files: Sequence[FileSpec], old: Sequence[tuple[int, int]], left_out: set[tuple[int, int]]
) -> list[str]:
    """A warning about tensors that are in several shards."""
    notes = []
    if old:
        copies = "1 tensor" if len(old) == 1 else f"{len(old)} tensors"
        file = files[old[0][0]].name
        notes.append(f"{copies} left out, as in {file}: the index names another shard for them")
    names = Counter(
        tensor.name
        for file, spec in enumerate(files)
        for i, tensor in spec.tensors
        if (file, i) not in left_out
    )
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        number = "1 tensor is" if len(twice) == 1 else f"{len(twice)} tensors are"
        notes.append(
            f"{number} in several shards, as {shown(twice[0])}, and no index says which one counts:"
            " each is handed out, in any order"
        )
    return notes
