"""A limit on the bytes per second that are sent."""

from __future__ import annotations

import time
from collections.abc import Callable

_PAUSE_S = 0.1  # short, so that the caller can check for failures between pauses


class RateLimit:
    """In every interval at most the rate times its length, plus one chunk.

    The clock starts when this is made: the first chunk waits for its own share of time too.
    """

    def __init__(
        self, bytes_per_second: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._next_at = clock()  # when everything sent so far is paid for

    def take(self, nbytes: int, pause: Callable[[float], object]) -> None:
        """Call `pause(seconds)` until `nbytes` may be sent."""
        seconds = nbytes / self._rate
        # Idle time earns one chunk, not a burst of many.
        self._next_at = max(self._next_at, self._clock() - seconds) + seconds
        while (left_s := self._next_at - self._clock()) > 0:
            pause(min(left_s, _PAUSE_S))
