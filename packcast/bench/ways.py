"""What every way of moving weights has in common: made, started together, checked, let go.

Knows no particular way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from packcast.bench.model import Case
from packcast.bench.stock import Stock
from packcast.bench.team import Team
from packcast.errors import PackcastError
from packcast.packed.counters import Counters


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of one case on one rank. `readers` are the ranks that read; `run_id` is unique."""

    case: Case
    team: Team
    stock: Stock
    readers: tuple[int, ...]
    run_id: str
    checked: bool


class RunFailed(PackcastError):
    """A run that failed on this rank without leaving another one waiting for it."""


class GivenUp(RunFailed):
    """A run that was broken off here because another rank's failed, which has the reason."""


class Way(Protocol):
    """One run of one method. All ranks call the same, in this order; close also after a failure."""

    def prepare(self) -> None:
        """Allocate, open, reserve: alone, without a collective. May raise PackcastError."""

    def connect(self) -> None:
        """What takes all ranks but is no part of the run, as agreeing on a plan."""

    def warm(self) -> None:
        """A first pass, where in use many follow; all ranks are connected."""

    def poison(self) -> None:
        """Leave nothing in buffers and targets that could pass for what is to come."""

    def run(self) -> float | None:
        """The timed part: ends when the last byte is where it belongs, or is under way on the
        device. Where more is done after that, it returns the moment, by `time.perf_counter()`."""

    def check(self) -> int:
        """How many blocks or tensors are not the sender's; may take all ranks."""

    def close(self) -> None:
        """Give everything back; idempotent."""

    @property
    def counters(self) -> Counters:
        """Of the data path; empty for ways that count nothing."""

    @property
    def pinned_nbytes(self) -> int:
        """Pinned host memory, once it has run."""


@dataclass(slots=True)
class Plain:
    """The parts of a Way that most ways do not need."""

    job: Job
    counters: Counters = field(default_factory=Counters)
    pinned_nbytes: int = 0

    def prepare(self) -> None:
        """Nothing to allocate."""

    def connect(self) -> None:
        """Nothing to agree on."""

    def warm(self) -> None:
        """The first pass is as good as any."""

    def poison(self) -> None:
        """Nothing to overwrite."""

    def close(self) -> None:
        """Nothing to give back."""


def time_run(way: Way, team: Team) -> float:
    """Seconds from the common start until this rank is done."""
    way.warm()
    way.poison()
    team.start_together()
    began = time.perf_counter()
    ended = way.run()
    team.synchronize()
    return (ended or time.perf_counter()) - began
