"""A sink for tests: memory that was poisoned first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from packcast.checkpoint.outgoing import FileSpec
from packcast.io.work import Outcome, Span, Task
from packcast.packed.plan import Extent


class MemorySink:
    """Keeps what it gets; `before_put(file, offset)` may sleep or raise."""

    stage: Final = "write"
    task: Final = Task.CHECK

    def __init__(self, files: Sequence[FileSpec], before_put: Callable[[int, int], object]) -> None:
        self.bytes = [bytearray(b"\xa5" * spec.nbytes) for spec in files]
        self.before_put = before_put
        self.notes: list[str] = []

    def prepare(self) -> None: ...

    def lend(self, extent: Extent) -> tuple[Span, ...]:
        return ()

    def take(
        self, extent: Extent, spans: tuple[Span, ...], data: memoryview, outcome: Outcome
    ) -> None:
        self.before_put(extent.file, extent.offset)
        if outcome.good:
            self.bytes[extent.file][extent.offset : extent.offset + extent.nbytes] = data

    def finish(self) -> None: ...

    def publish(self) -> None: ...

    def abort(self) -> None: ...

    def result(self) -> dict[str, object]:
        return {}
