"""From what was measured to the rows of the table: rates, limits, ratios, best points. Pure.

All rows are made anew from all measurements: a baseline may come after what is compared with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from packcast.bench.model import Case, Limit, LimitStage, Measured, Run
from packcast.bench.stats import (
    Advice,
    Seconds,
    Waiting,
    advise,
    ratio,
    slowest_rank,
    steady,
    summarize,
    waiting_on,
)
from packcast.units import GIB

OURS = ("packcast", "compat")
ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Reached:
    """The limit that binds a case, and what part of it the case reached."""

    stage: LimitStage
    bytes_per_second: float
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case: sizes in bytes, times in seconds. Without `seconds` there is a `failure`.

    `ratio_to_original` is above 1 where this is faster. `limits` are all that bear on the case.
    `wrong` is the most of any run; `first_seconds` the very first run, warm-up included;
    `loop_seconds_per_gib` the CPU time of the sender's loop, where it was measured.
    """

    case: Case
    nbytes: int
    seconds: Seconds | None = None
    bytes_per_second: float | None = None
    limit: Reached | None = None
    limits: tuple[Limit, ...] = ()
    ratio_to_original: float | None = None
    wrong: int = 0
    waiting_on: Waiting | None = None
    peak_device_nbytes: int = 0
    peak_pinned_nbytes: int = 0
    loop_seconds_per_gib: float | None = None
    first_seconds: float | None = None
    slowest_rank: int | None = None
    failure: str | None = None
    warnings: tuple[Advice, ...] = ()
    is_best: bool = False
    runs: tuple[Run, ...] = ()

    @property
    def is_ours(self) -> bool:
        """No baseline."""
        return self.case.method in OURS

    @property
    def combination(self) -> tuple[str, str, str]:
        """Shape, source and sink: within them rows are compared."""
        return combination(self.case)


def combination(case: Case) -> tuple[str, str, str]:
    """Shape, source and sink."""
    return case.shape, case.source, case.sink


def make_rows(measured: Iterable[Measured]) -> tuple[Row, ...]:
    """A row for each case, those of one combination together, in the order in which they came."""
    every = list(measured)
    originals: dict[tuple[str, str, str], list[float]] = {}
    for one in every:
        if one.case.method == ORIGINAL and (rates := _rates(one)):
            originals.setdefault(combination(one.case), rates)
    rows = [_row(one, originals.get(combination(one.case), [])) for one in every]
    best = [_best_of(group) for group in grouped(rows).values()]
    marked = [replace(row, is_best=any(row is one for one in best)) for row in rows]
    return tuple(row for group in grouped(marked).values() for row in group)


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows by combination, in the order in which each was met first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.combination, []).append(row)
    return groups


def binding_limit(case: Case, limits: Iterable[Limit]) -> Limit | None:
    """What a case's stages reach together, where that was measured; else the lowest of the limits
    that bear on it.

    Of the broadcast's, the one of 1 GiB per call: small buffers are the case's own choice. The
    one of the case's buffer size stands in where the other was not measured.
    """
    bearing: dict[str, Limit] = {}
    for limit in limits:
        if limit.readers not in (None, case.readers):
            continue
        if limit.buffer_size not in (None, case.buffer_size):
            continue
        if limit.sink not in (None, case.sink):
            continue
        known = bearing.get(limit.stage)
        if known is None or (known.buffer_size is not None and limit.buffer_size is None):
            bearing[limit.stage] = limit
    if "together" in bearing:
        return bearing["together"]
    return min(bearing.values(), key=lambda limit: limit.bytes_per_second, default=None)


def _rates(measured: Measured) -> list[float]:
    times = [run.seconds for run in steady(measured.runs)]
    return [measured.nbytes / seconds for seconds in times if seconds > 0]


def _row(measured: Measured, originals: Sequence[float]) -> Row:
    case, runs = measured.case, steady(measured.runs)
    row = Row(case=case, nbytes=measured.nbytes, limits=measured.limits, failure=measured.failure)
    if measured.failure is not None or not runs:
        failure = measured.failure or "was not run"
        ours = "smaller or fewer buffers need less memory"
        what = ours if row.is_ours else "the comparison goes on without it"
        advice = Advice("impossible", failure, what)
        return replace(row, failure=failure, warnings=(advice,), runs=measured.runs)
    seconds = summarize([run.seconds for run in runs])
    rate = measured.nbytes / seconds.median if seconds.median > 0 else 0.0
    binding = binding_limit(case, measured.limits)
    limit = (
        Reached(binding.stage, binding.bytes_per_second, rate / binding.bytes_per_second)
        if binding and binding.bytes_per_second > 0
        else None
    )
    # Warm-up too: a wrong byte is a wrong byte.
    wrong = max(sum(part.wrong for part in run.ranks) for run in measured.runs)
    parts = [part for run in measured.runs for part in run.ranks]
    return replace(
        row,
        seconds=seconds,
        bytes_per_second=rate,
        limit=limit,
        ratio_to_original=1.0 if case.method == ORIGINAL else ratio(_rates(measured), originals),
        wrong=wrong,
        waiting_on=waiting_on(runs),
        peak_device_nbytes=max(part.peak_device_nbytes for part in parts),
        peak_pinned_nbytes=max(part.peak_pinned_nbytes for part in parts),
        loop_seconds_per_gib=_loop_seconds_per_gib(measured),
        first_seconds=measured.runs[0].seconds,
        slowest_rank=slowest_rank(runs),
        warnings=advise(measured.runs, wrong=wrong, fraction=limit.fraction if limit else None),
        runs=measured.runs,
    )


def _loop_seconds_per_gib(measured: Measured) -> float | None:
    """The median over the runs; None where the sender ran no loop that is counted."""
    parts = [part for run in steady(measured.runs) for part in run.ranks]
    found = [part.loop_seconds for part in parts if part.rank == measured.sender]
    median = statistics.median(found) if found else 0.0
    return median / (measured.nbytes / GIB) if median and measured.nbytes else None


def _best_of(rows: Iterable[Row]) -> Row | None:
    """The fastest of ours that has every byte right."""
    able = [row for row in rows if row.is_ours and row.bytes_per_second and not row.wrong]
    return max(able, key=lambda row: row.bytes_per_second or 0.0, default=None)
