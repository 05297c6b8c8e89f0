"""Time in which this process was able to run, for other ranks' deadlines."""

from __future__ import annotations

import time


class AwakeClock:
    """Monotonic seconds that stand still while this process does.

    A process that was stopped (SIGSTOP, a debugger, swapping) for longer than a deadline would
    take all others for lost. So a gap between two readings counts as at most `step_s`, and waiting
    code must read more often than that. Unlike a restart of the deadline after a gap this ends in
    bounded time on a machine full of gaps.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._read_at = time.monotonic()
        self._seconds = 0.0

    def read(self) -> float:
        """Seconds awake since the clock was made."""
        now = time.monotonic()
        self._seconds += min(now - self._read_at, self._step_s)
        self._read_at = now
        return self._seconds
