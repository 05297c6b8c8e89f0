"""A sink for tests: memory that was poisoned first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from packcast.checkpoint.outgoing import FileSpec


class MemorySink:
    """Keeps what it gets; `before_put(file, offset)` may sleep or raise."""

    stage: Final = "write"

    def __init__(self, files: Sequence[FileSpec], before_put: Callable[[int, int], object]) -> None:
        self.bytes = [bytearray(b"\xa5" * spec.nbytes) for spec in files]
        self.before_put = before_put
        self.notes: list[str] = []

    def prepare(self) -> None: ...

    def put(self, file: int, offset: int, data: memoryview) -> None:
        self.before_put(file, offset)
        self.bytes[file][offset : offset + len(data)] = data

    def finish(self) -> None: ...

    def publish(self) -> None: ...

    def abort(self) -> None: ...

    def result(self) -> dict[str, object]:
        return {}
