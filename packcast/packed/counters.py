"""Bytes, busy time and waiting time of every stage of a transfer; on demand a trace of events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from packcast.packed.plan import Extent

Stage = Literal["read", "pack", "h2d", "broadcast", "d2h", "unpack", "write", "verify", "discard"]
STAGES: tuple[Stage, ...] = get_args(Stage)


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
    """What a stage has done so far.

    `busy_s` is summed over threads, so it may exceed the time from `first_begin` to `last_end`;
    `waiting_s` is how long the loop over the chunks waited for this stage.
    """

    nbytes: int = 0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    first_begin: float = float("inf")
    last_end: float = 0.0


class StageWork(Protocol):
    """What an I/O pool, which counts by itself, has done of a stage."""

    @property
    def nbytes(self) -> int: ...
    @property
    def busy_s(self) -> float: ...
    @property
    def first_begin(self) -> float: ...
    @property
    def last_end(self) -> float: ...


class Counters:
    """The counters of one rank, safe to use from every thread."""

    def __init__(self, *, trace: bool = False) -> None:
        self._lock = threading.Lock()
        self._totals: dict[Stage, StageTotal] = {}
        self._followed: dict[Stage, Callable[[], StageWork]] = {}
        self._trace: list[StageEvent] | None = [] if trace else None
        self.newest: Extent | None = None  # that the loop has seen
        self.standing: str | None = None  # the stage that the loop waits for now
        self.num_pauses = 0  # of the rate limit
        self.loop_seconds = 0.0  # CPU time of the loop's thread, once it is over

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

    def follow(self, stage: Stage, work: Callable[[], StageWork]) -> None:
        """Count what `work()` returns for the stage, now and later, until `unfollow`."""
        with self._lock:
            self._followed[stage] = work

    def unfollow(self, stage: Stage) -> None:
        """Count the stage's work up to now, and no more."""
        with self._lock:
            work = self._followed.pop(stage, None)
            if work is not None:
                self._totals[stage] = self._with_work(stage, work())

    def waiting_on(self, stage: Stage) -> WaitTimer:
        """Count the time inside the `with` as time that the loop waited for `stage`."""
        return WaitTimer(self, stage)

    def waited(self, stage: Stage, seconds: float) -> None:
        """Count a wait that is over."""
        with self._lock:
            self._totals.setdefault(stage, StageTotal()).waiting_s += seconds

    def nbytes(self, stage: Stage) -> int:
        """How many bytes the stage has finished."""
        with self._lock:
            total = self._totals.get(stage)
            followed = self._followed.get(stage)
            return (total.nbytes if total else 0) + (followed().nbytes if followed else 0)

    def totals(self) -> dict[Stage, StageTotal]:
        """A copy of all totals at this moment, in the order of the stages."""
        with self._lock:
            totals = {stage: replace(total) for stage, total in self._totals.items()}
            for stage, work in self._followed.items():
                totals[stage] = self._with_work(stage, work())
            return {stage: totals[stage] for stage in STAGES if stage in totals}

    def _with_work(self, stage: Stage, work: StageWork) -> StageTotal:
        total = self._totals.get(stage, StageTotal())
        return StageTotal(
            total.nbytes + work.nbytes,
            total.busy_s + work.busy_s,
            total.waiting_s,
            min(total.first_begin, work.first_begin),
            max(total.last_end, work.last_end),
        )

    def trace(self) -> list[StageEvent]:
        """The events so far, in the order in which they ended; empty without `trace=True`."""
        with self._lock:
            return list(self._trace or ())


_wanted: ContextVar[Counters | None] = ContextVar("packcast-counters", default=None)


@contextmanager
def counting(counters: Counters) -> Iterator[None]:
    """Count and time the library calls of this thread; without it they skip that small cost."""
    before = _wanted.set(counters)
    try:
        yield
    finally:
        _wanted.reset(before)


def wanted_counters() -> Counters | None:
    """The counters of the innermost `counting`, if any."""
    return _wanted.get()


class WaitTimer:
    """The `with` of `Counters.waiting_on`: a class, since a generator would slow the loop."""

    __slots__ = ("_before", "_begin", "_counters", "_stage")

    def __init__(self, counters: Counters, stage: Stage) -> None:
        self._counters = counters
        self._stage = stage

    def __enter__(self) -> None:
        self._before, self._counters.standing = self._counters.standing, self._stage
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._counters.standing = self._before
        self._counters.waited(self._stage, time.perf_counter() - self._begin)
