"""The sink of a worker that only proves digests: every byte is dropped.

Knows no files.
"""

from __future__ import annotations

from typing import Final

from packcast.ends.work import Outcome, Span, Task
from packcast.packed.plan import Extent


class DiscardSink:
    """Takes runs that are already proven by their digests, and forgets them."""

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

    def finish(self) -> None:
        """Nothing to make durable."""

    def publish(self) -> None:
        """Nothing to name."""

    def abort(self) -> None:
        """Nothing to remove."""

    def result(self) -> dict[str, object]:
        return {"sink": "discard"}
