"""The sink that verifies every byte and drops it.

Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from packcast.io.landing import Sink
from packcast.io.work import Task
from packcast.packed.counters import Stage
from packcast.packed.plan import Chunk


class DiscardSink(Sink):
    """Drops verified runs. On a CPU digests verify them; beside a GPU sums do, so that the bytes
    need not come to the host (see DeviceLanding)."""

    stage: ClassVar[Stage] = "discard"
    task = Task.WRITE  # to nowhere

    def planned(self, chunks: Sequence[Chunk]) -> None:
        """Its bytes go nowhere on the device either."""
