"""A sink for tests: memory that was poisoned first."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import PackcastError, TransferError
from packcast.io.schedule import IN_MEMORY, Schedule, ScheduledUnit, Span
from packcast.io.work import Failure, Task
from packcast.packed.plan import Extent


class MemorySink:
    """Keeps what it gets; `before(file, offset)`, of a unit that may come, may sleep or raise."""

    stage: Final = "write"
    task: Final = Task.WRITE

    def __init__(
        self, files: Sequence[FileSpec], before: Callable[[int, int], object] = lambda *_: None
    ) -> None:
        self._memory = [array("B", b"\xa5" * spec.nbytes) for spec in files]
        self._before = before
        self.notes: list[str] = []
        self.descriptors = array("i", [-1])

    @property
    def bytes(self) -> list[bytes]:
        """What has come, by file."""
        return [memory.tobytes() for memory in self._memory]

    def prepare(self) -> None: ...

    def spans(self, extent: Extent) -> Iterator[Span]:
        address, _ = self._memory[extent.file].buffer_info()
        yield Span(IN_MEMORY, address + extent.offset, 0, extent.nbytes)

    def open_files(self, schedule: Schedule) -> MemorySink:
        return self

    def admit(self, unit: ScheduledUnit, *, is_next: bool) -> bool:
        extent = unit.chunk.extents[0]
        self._before(extent.file, extent.offset)
        return True

    def retire(self, unit: ScheduledUnit) -> None: ...

    def hold(self) -> None: ...

    def let_go(self) -> None: ...

    def error_of(self, failure: Failure, span: Span) -> PackcastError:
        return TransferError(f"copying failed: {failure.reason}")

    def compared(self, span: Span, offset: int) -> None: ...

    def finish(self) -> None: ...

    def publish(self) -> None: ...

    def abort(self) -> None: ...

    def result(self) -> dict[str, object]:
        return {}
