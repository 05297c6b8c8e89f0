"""Time in which this process was able to run, for deadlines that blame others."""

from __future__ import annotations

import time


class AwakeClock:
    """Monotonic seconds that stand still while this process does.

    A process that was stopped (SIGSTOP, a debugger, swapping) for longer than a deadline would
    blame all others for its own sleep. So no two readings are further apart than `step_s`:
    whoever waits must read more often than that, and a longer gap counts as one step. Unlike
    "start again after a gap" this still ends in bounded time on a machine full of gaps.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._read_at = time.monotonic()
        self._seconds = 0.0

    def read(self) -> float:
        """Seconds awake since the clock was made, as far as its reader can tell."""
        now = time.monotonic()
        self._seconds += min(now - self._read_at, self._step_s)
        self._read_at = now
        return self._seconds
