"""What this rank says of itself, and when: the content of its heartbeats, and their interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from packcast.control.frames import Progress


class Heartbeat:
    """The heartbeats of this rank, every `interval_s`.

    `position` and `progress` are the transfer's callbacks, which run on the control thread. It may
    miss heartbeats for `patience_s`.
    """

    def __init__(self, interval_s: float, log: Callable[[str], None]) -> None:
        self.interval_s = interval_s
        self.patience_s = 0.0
        self.position: Callable[[], str] = str
        self.progress: Callable[[], Progress] = Progress
        self._log = log
        self._next = 0.0
        self._has_failed = False

    def is_due(self, now: float) -> bool:
        """Whether to send one now; the next is due an interval later."""
        if now < self._next:
            return False
        self._next = now + self.interval_s
        return True

    def content(self) -> Progress:
        """Of the next one."""
        try:
            progress = self.progress()
        except Exception as error:
            if not self._has_failed:
                self._log(f"heartbeats carry no progress: {error!r}")
            self._has_failed = True
            progress = Progress()
        return replace(progress, patience_s=self.patience_s)

    def forget(self) -> None:
        """Drop the callbacks, whose object has large buffers: a channel is a reference cycle."""
        self.position, self.progress = str, Progress
