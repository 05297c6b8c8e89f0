"""Numbers out of runs: medians and spreads, ratios pair by pair, and what is odd about them.

Pure arithmetic over `packcast.bench.model`; knows nothing of how it is shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from packcast.bench.model import Run

# A first run so much slower than the median of the others met something cold.
FIRST_RUN_FACTOR = 1.3
# Above this spread two settings that differ by a tenth cannot be told apart by three runs.
WIDE_CV = 0.15
_ABOVE_LIMIT = 1.05  # less is the noise of two measurements
# Waiting as a stage's own is blamed on its worst rank. Nobody alone waits for a collective: where
# one rank holds the others up elsewhere, it is the one that does not wait there.
_COLLECTIVE = "broadcast"

WarningKind = Literal["impossible", "wrong-bytes", "first-run-slow", "wide-spread", "above-limit"]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of the steady runs. `p95` by nearest rank: the least time within which 95 % of the runs
    were done, so with fewer than 20 runs it is `max`. `cv` is the sample's standard deviation over
    its mean; 0 for a single run."""

    median: float
    min: float
    max: float
    p95: float
    cv: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The stage that the loops stood still for longest, where, and for what share of the time."""

    stage: str
    rank: int | None  # None: a collective's, all ranks'
    share: float

    def __str__(self) -> str:
        return self.stage if self.rank is None else f"{self.stage}, rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Advice:
    """A warning: what is odd, and what to do about it."""

    kind: WarningKind
    text: str
    advice: str


def steady(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Without the warm-up."""
    return tuple(run for run in runs if not run.is_warmup)


def summarize(seconds: Sequence[float]) -> Seconds:
    """At least one time."""
    mean = statistics.fmean(seconds)
    spread = statistics.stdev(seconds) if len(seconds) > 1 and mean > 0 else 0.0
    return Seconds(
        median=statistics.median(seconds),
        min=min(seconds),
        max=max(seconds),
        p95=nearest_rank(seconds, 0.95),
        cv=spread / mean if mean > 0 else 0.0,
    )


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    # Rounded, or 0.95 * 20 were a hair above 19.
    return sorted(values)[max(1, math.ceil(round(share * len(values), 9))) - 1]


def ratio(rates: Sequence[float], others: Sequence[float]) -> float | None:
    """The median of ratios, run i over run i: what disturbs both at one time falls out.

    Runs without a partner are left out; None where there is no pair.
    """
    pairs = zip(rates, others, strict=False)
    ratios = [rate / other for rate, other in pairs if other > 0]
    return statistics.median(ratios) if ratios else None


def slowest_rank(runs: Sequence[Run]) -> int | None:
    """The rank with the largest median time; the lowest of equals; None without runs."""
    times: dict[int, list[float]] = {}
    for run in runs:
        for part in run.ranks:
            times.setdefault(part.rank, []).append(part.seconds)
    medians = {rank: statistics.median(found) for rank, found in sorted(times.items())}
    return max(medians, key=lambda rank: medians[rank], default=None)


def waiting_on(runs: Sequence[Run]) -> Waiting | None:
    """What holds the runs back; None where no waiting was recorded.

    A stage counts with its worst rank; the broadcast with the rank that waits for it least, of
    those that wait for anything.
    """
    total = sum(run.seconds for run in runs)
    if total <= 0:
        return None
    waited: dict[int, dict[str, float]] = {}
    for run in runs:
        for part in run.ranks:
            _add(waited.setdefault(part.rank, {}), part.waiting)
    found: list[Waiting] = []
    for rank, stages in sorted(waited.items()):
        found.extend(
            Waiting(stage, rank, seconds / total)
            for stage, seconds in stages.items()
            if stage != _COLLECTIVE and seconds > 0
        )
    least = [stages.get(_COLLECTIVE, 0.0) for stages in waited.values() if any(stages.values())]
    if least and min(least) > 0:
        found.append(Waiting(_COLLECTIVE, None, min(least) / total))
    return max(found, key=lambda waiting: waiting.share, default=None)


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for stage, seconds in more.items():
        sums[stage] = sums.get(stage, 0.0) + seconds


def advise(runs: Sequence[Run], *, wrong: int, fraction: float | None) -> tuple[Advice, ...]:
    """What is odd about a case that was run. `fraction` of its limit, where that is known."""
    found: list[Advice] = []
    if wrong:
        found.append(
            Advice(
                "wrong-bytes",
                f"{wrong} blocks or tensors are not the sender's",
                "do not trust this path: look at the rows' runs for the rank, then at its host",
            )
        )
    times = [run.seconds for run in steady(runs)]
    others = times[1:]
    if len(others) > 1 and not runs[0].is_warmup:
        usual = statistics.median(others)
        if times[0] > FIRST_RUN_FACTOR * usual:
            found.append(
                Advice(
                    "first-run-slow",
                    f"the first run took {times[0] / usual:.1f} times as long as the others",
                    "caches were cold: use --warmup 1, or --cold to measure just that",
                )
            )
            times = others  # or the one cause would be told twice
    cv = summarize(times).cv if len(times) > 2 else 0.0
    if cv > WIDE_CV:
        found.append(
            Advice(
                "wide-spread",
                f"the runs spread by {cv:.0%} (cv)",
                "the machine is noisy: stop what else runs there, or use more --runs",
            )
        )
    if fraction is not None and fraction > _ABOVE_LIMIT:
        found.append(
            Advice(
                "above-limit",
                f"{fraction:.0%} of its limit",
                "so it is none, measured in a bad moment: run again on a quiet machine",
            )
        )
    return tuple(found)
