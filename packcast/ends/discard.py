"""The sink of a worker that only proves what comes: every byte is dropped.

Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from packcast.ends.work import Outcome, Span, Task
from packcast.packed.plan import Chunk, Extent


class DiscardSink:
    """Takes runs that are already proven, and forgets them: by their digests on a CPU, by sums
    beside a GPU, where they need not come to the host for that (see DeviceLanding)."""

    stage: Final = "discard"
    task: Final = Task.CHECK

    def __init__(self) -> None:
        self.notes: list[str] = []

    def prepare(self) -> None:
        """Nothing to reserve."""

    def lend(self, extent: Extent) -> tuple[Span, ...]:
        """Its bytes go nowhere."""
        return ()

    def take(
        self, extent: Extent, spans: tuple[Span, ...], data: memoryview, outcome: Outcome
    ) -> None:
        """Drop `data`."""

    def placed(self, chunks: Sequence[Chunk]) -> None:
        """Its bytes go nowhere on the device either."""

    def finish(self) -> None:
        """Nothing to make durable."""

    def publish(self) -> None:
        """Nothing to name."""

    def abort(self) -> None:
        """Nothing to remove."""

    def result(self) -> dict[str, object]:
        return {"sink": "discard"}
