"""A limit on the bytes per second that are sent: when the next chunk may go. Knows no chunks."""

from __future__ import annotations

import time
from collections.abc import Callable

_PAUSE_S = 0.1  # so that whoever pauses can look after other things


class RateLimit:
    """In any length of time not more than the rate allows, and one chunk.

    From when this is made: the first chunk waits for its own share of time too.
    """

    def __init__(
        self, bytes_per_second: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._next_at = clock()  # when all that was let go is paid for

    def take(self, nbytes: int, pause: Callable[[float], object]) -> None:
        """Call `pause` with a few seconds at a time until `nbytes` may go."""
        seconds = nbytes / self._rate
        # Time in which nothing was sent counts for one chunk, not for a burst of many.
        self._next_at = max(self._next_at, self._clock() - seconds) + seconds
        while (left_s := self._next_at - self._clock()) > 0:
            pause(min(left_s, _PAUSE_S))
