"""A sink for tests: memory that was poisoned first."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from packcast.checkpoint.outgoing import FileSpec
from packcast.io.files import Resources
from packcast.io.landing import Sink
from packcast.io.schedule import IN_MEMORY, Schedule, ScheduledUnit, Span
from packcast.io.work import Task
from packcast.packed.counters import Stage
from packcast.packed.plan import Extent


class MemorySink(Sink, Resources):
    """Keeps what it gets; `before(file, offset)`, of a unit that may come, may sleep or raise."""

    stage: ClassVar[Stage] = "write"
    task = Task.WRITE

    def __init__(
        self, files: Sequence[FileSpec], before: Callable[[int, int], object] = lambda *_: None
    ) -> None:
        Sink.__init__(self)
        Resources.__init__(self)
        self._memory = [array("B", b"\xa5" * spec.nbytes) for spec in files]
        self._before = before

    @property
    def bytes(self) -> list[bytes]:
        """What has come, by file."""
        return [memory.tobytes() for memory in self._memory]

    def spans(self, extent: Extent) -> Iterator[Span]:
        address, _ = self._memory[extent.file].buffer_info()
        yield Span(IN_MEMORY, address + extent.offset, 0, extent.nbytes)

    def open_files(self, schedule: Schedule) -> MemorySink:
        return self

    def admit(self, unit: ScheduledUnit, *, is_next: bool) -> bool:
        extent = unit.chunk.extents[0]
        self._before(extent.file, extent.offset)
        return True
