"""Bytes, seconds and waiting of every stage of a transfer; and on demand a trace of events.

Displays and reports read it, tests read the trace; it knows neither.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from packcast.packed.plan import Extent

Stage = Literal["read", "pack", "h2d", "broadcast", "d2h", "unpack", "write", "verify", "discard"]


@dataclass(frozen=True, slots=True)
class StageEvent:
    """One piece of work of one stage; times are `time.perf_counter()` seconds on this host."""

    stage: Stage
    chunk: int
    nbytes: int
    begin: float
    end: float


@dataclass(slots=True)
class StageTotal:
    """What a stage did so far.

    `busy_s` adds up over threads, so it may exceed the time from `first_begin` to `last_end`;
    `waiting_s` is how long the loop over the chunks stood still for this stage.
    """

    nbytes: int = 0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    first_begin: float = field(default=float("inf"))
    last_end: float = 0.0


class Counters:
    """The counters of one rank, safe to use from every thread."""

    def __init__(self, *, trace: bool = False) -> None:
        self._lock = threading.Lock()
        self._totals: dict[Stage, StageTotal] = {}
        self._trace: list[StageEvent] | None = [] if trace else None
        self.newest: Extent | None = None  # the newest bytes that the loop has seen

    def add(self, stage: Stage, chunk: int, nbytes: int, begin: float, end: float) -> None:
        """Count one finished piece of work."""
        with self._lock:
            total = self._totals.setdefault(stage, StageTotal())
            total.nbytes += nbytes
            total.busy_s += end - begin
            total.first_begin = min(total.first_begin, begin)
            total.last_end = max(total.last_end, end)
            if self._trace is not None:
                self._trace.append(StageEvent(stage, chunk, nbytes, begin, end))

    def waiting_on(self, stage: Stage) -> Waiting:
        """Count the time inside the `with` as time that the loop stood still for `stage`."""
        return Waiting(self, stage)

    def waited(self, stage: Stage, seconds: float) -> None:
        """The same, where the stage is known only once the wait is over."""
        with self._lock:
            self._totals.setdefault(stage, StageTotal()).waiting_s += seconds

    def nbytes(self, stage: Stage) -> int:
        """How many bytes the stage has finished."""
        with self._lock:
            total = self._totals.get(stage)
            return total.nbytes if total else 0

    def totals(self) -> dict[Stage, StageTotal]:
        """A copy of all totals at this moment."""
        with self._lock:
            return {
                stage: StageTotal(
                    total.nbytes,
                    total.busy_s,
                    total.waiting_s,
                    total.first_begin,
                    total.last_end,
                )
                for stage, total in self._totals.items()
            }

    def trace(self) -> list[StageEvent]:
        """The events so far, in the order in which they ended; empty without `trace=True`."""
        with self._lock:
            return list(self._trace or ())


_wanted: ContextVar[Counters | None] = ContextVar("packcast-counters", default=None)


@contextmanager
def counting(counters: Counters) -> Iterator[None]:
    """The library's calls that this thread makes meanwhile count and time what they do there.

    Else they do not, since that costs them a little; their arguments are their users'.
    """
    before = _wanted.set(counters)
    try:
        yield
    finally:
        _wanted.reset(before)


def wanted_counters() -> Counters | None:
    """Those of the innermost `counting`, if any."""
    return _wanted.get()


class Waiting:
    """The `with` of `Counters.waiting_on`: a class, since a generator costs the loop too much."""

    __slots__ = ("_begin", "_counters", "_stage")

    def __init__(self, counters: Counters, stage: Stage) -> None:
        self._counters = counters
        self._stage = stage

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._counters.waited(self._stage, time.perf_counter() - self._begin)
