"""The sink of a worker that only proves digests: every byte is dropped.

Knows no files.
"""

from __future__ import annotations

from typing import Final


class DiscardSink:
    """Takes runs that are already proven by their digests, and forgets them."""

    stage: Final = "discard"

    def __init__(self) -> None:
        self.notes: list[str] = []

    def prepare(self) -> None:
        """Nothing to reserve."""

    def put(self, file: int, offset: int, data: memoryview) -> None:
        """Drop `data`."""

    def finish(self) -> None:
        """Nothing to make durable."""

    def publish(self) -> None:
        """Nothing to name."""

    def abort(self) -> None:
        """Nothing to remove."""

    def result(self) -> dict[str, object]:
        return {"sink": "discard"}
