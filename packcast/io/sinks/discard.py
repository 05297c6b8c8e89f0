"""The sink of a worker that only proves what comes: every byte is dropped.

Knows no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from packcast.errors import PackcastError, TransferError
from packcast.io.files import NoResources
from packcast.io.schedule import Schedule, Span
from packcast.io.work import Failure, Task
from packcast.packed.plan import Chunk, Extent


class DiscardSink:
    """Takes runs that are already proven, and forgets them: by their digests on a CPU, by sums
    beside a GPU, where they need not come to the host for that (see DeviceLanding)."""

    stage: Final = "discard"
    task: Final = Task.WRITE  # to nowhere

    def __init__(self) -> None:
        self.notes: list[str] = []

    def prepare(self) -> None:
        """Nothing to reserve."""

    def spans(self, extent: Extent) -> Iterable[Span]:
        """Its bytes go nowhere."""
        return ()

    def open_files(self, schedule: Schedule) -> NoResources:
        return NoResources()

    def error_of(self, failure: Failure, span: Span) -> PackcastError:
        return TransferError(f"dropping failed: {failure.reason}")

    def compared(self, span: Span, offset: int) -> None:
        """Nothing is."""

    def planned(self, chunks: Sequence[Chunk]) -> None:
        """Its bytes go nowhere on the device either."""

    def finish(self) -> None:
        """Nothing to make durable."""

    def publish(self) -> None:
        """Nothing to name."""

    def abort(self) -> None:
        """Nothing to remove."""

    def result(self) -> dict[str, object]:
        return {"sink": "discard"}
