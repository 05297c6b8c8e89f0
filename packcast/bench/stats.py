"""Comparisons between rows: ratios, limits, the fastest row, warnings. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from packcast.bench.model import OURS, Case, Limit, LimitStage, Row
from packcast.packed.counters import Stage, StageTotal
from packcast.units import format_rate

# Above this spread, three runs cannot tell two settings apart that differ by a tenth.
WIDE_CV = 0.15
_LEAST_NOISE = 0.01
_ABOVE_LIMIT = 1.05


def reference_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row to compare with: `original`; for a chain, gloo's broadcast of the same chunks."""
    case = row.case
    over_gloo = case.method in ("chain", "gloo broadcast")
    method = "gloo broadcast" if over_gloo else "original"
    for other in rows:
        same_table = other.case.combination == case.combination
        same_chunks = not over_gloo or other.case.buffers == case.buffers
        if other.case.method == method and same_table and same_chunks:
            return other
    return None


def ratio_of(row: Row, reference: Row | None) -> float | None:
    """Above 1 where the row is faster than its reference; None where there is no pair of runs.

    The median of the ratios of run i to run i, so that a disturbance of both cancels out.
    """
    if reference is None or row.failure is not None:
        return None
    pairs = zip(reference.steady, row.steady, strict=False)
    ratios = [theirs.seconds / ours.seconds for theirs, ours in pairs]
    # Files are larger than resident weights by their headers.
    return statistics.median(ratios) * row.nbytes / reference.nbytes if ratios else None


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows with a run that counts, or with a failure."""
    return [row for row in rows if row.failure is not None or row.steady]


def shown(rows: Iterable[Row]) -> list[Row]:
    """The rows of the main table; limits have a table of their own."""
    return [row for row in measured(rows) if row.case.limit is None]


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows by combination, in their order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.combination, []).append(row)
    return groups


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """The fastest of packcast's rows without a wrong byte, and those that are as fast.

    As fast: the medians differ by less than the larger spread (cv) of the two rows.
    """
    able = [row for row in rows if row.case.method in OURS and row.rate and not row.wrong]
    if not able:
        return []
    fastest = max(able, key=lambda row: row.rate or 0.0)
    return [fastest, *(row for row in able if row is not fastest and _is_near(row, fastest))]


def _is_near(row: Row, fastest: Row) -> bool:
    ours, theirs = row.seconds, fastest.seconds
    if ours is None or theirs is None:
        return False
    slower = 1 - (row.nbytes / ours.median) / (fastest.nbytes / theirs.median)
    return slower < max(_LEAST_NOISE, ours.cv, theirs.cv)


def binding_limit(case: Case, limits: Iterable[Limit]) -> Limit | None:
    """What the case's stages reach together, if that was measured; else its slowest stage.

    Of the broadcast's limits the best counts: small buffers are the case's own choice.
    """
    if case.method in ("load_file", "limit"):
        return None
    stages = {"broadcast"}
    if case.source == "file":
        stages |= {"read", "h2d", "together"}
        stages |= {"write": {"d2h", "write"}, "verify": {"d2h"}}.get(case.sink, set())
    best: dict[str, Limit] = {}
    for limit in limits:
        fits = (
            limit.stage in stages
            and limit.readers in (None, case.readers)
            and limit.sink in (None, case.sink)
            and limit.shape in (None, case.shape)
        )
        if fits:
            best[limit.stage] = _faster(best.get(limit.stage), limit)
    if "together" in best:
        return best["together"]
    return min(best.values(), key=lambda limit: limit.bytes_per_second, default=None)


def _faster(one: Limit | None, other: Limit) -> Limit:
    return one if one and one.bytes_per_second >= other.bytes_per_second else other


def with_limits(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Each row with its limit, of those measured so far."""
    every = tuple(rows)
    limits = limits_of(every)
    return tuple(replace(row, limit=binding_limit(row.case, limits)) for row in every)


def limit_of(row: Row) -> Limit | None:
    """The limit that a row of the method `limit` measures: its best run."""
    case, times = row.case, [run.seconds for run in row.runs]
    if case.limit is None or not times or row.failure is not None:
        return None
    is_together = case.limit == "together"
    return Limit(
        stage=case.limit,
        bytes_per_second=row.nbytes / min(times),
        detail=f"{case.buffers}, best of {len(times)} runs",
        buffer_size=case.buffer_size if case.limit == "broadcast" else None,
        readers=case.readers if case.limit in ("read", "h2d", "together") else None,
        sink=case.sink if is_together else None,
        shape=case.shape if is_together else None,
    )


def limits_of(rows: Iterable[Row]) -> list[Limit]:
    """All limits measured so far, the best of each kind."""
    best: dict[str, Limit] = {}
    for limit in filter(None, map(limit_of, rows)):
        best[limit.label] = _faster(best.get(limit.label), limit)
    return sorted(best.values(), key=lambda limit: get_args(LimitStage).index(limit.stage))


def warnings_of(rows: Sequence[Row]) -> Iterator[str]:
    """Failures, wrong bytes and doubtful numbers: one warning of each kind, with the next step."""
    failures: dict[str, list[Row]] = {}
    for row in measured(rows):
        if row.failure is not None:
            failures.setdefault(row.failure, []).append(row)
    for failure, same in failures.items():
        yield f"{_where(same)}: {failure}"
    rows = shown(rows)
    if wrong := [row for row in rows if row.wrong]:
        text = f"{wrong[0].wrong} blocks or tensors differ from the sender's"
        yield f"{_where(wrong)}: {text}; --export-json has the numbers of every run and rank"
    noisy = [row for row in rows if row.seconds and row.seconds.cv > WIDE_CV]
    if wide := [row for row in noisy if len(row.runs) > 2]:
        text = "the machine is noisy: stop other programs, or use more --runs"
        yield f"{_where(wide)}: the runs spread by more than {WIDE_CV:.0%}; {text}"
    if above := [row for row in rows if (row.fraction or 0.0) > _ABOVE_LIMIT]:
        text = "the limit was measured too low: run again on a quiet machine"
        yield f"{_where(above)}: {above[0].fraction:.0%} of its limit; {text}"


def _where(rows: Sequence[Row]) -> str:
    more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
    return f"{rows[0].case}{more}"


def default_lines(rows: Iterable[Row]) -> Iterator[str]:
    """For each table with a choice: the rate of the defaults, compared with the best row."""
    for (shape, source, sink), group in grouped(rows).items():
        default = next((row for row in group if row.case.is_default), None)
        best = best_rows(group)[:1]
        num_ours = sum(row.case.method in OURS for row in group)
        if default and default.rate and best and num_ours > 1:
            share = default.rate / (best[0].rate or default.rate)
            yield (
                f"without options {shape}, {source} to {sink}, takes {default.case.buffers}, one"
                f" reader: {format_rate(default.rate)}, {share:.2f} of the best row"
            )


def waiting_on(row: Row) -> tuple[str, float] | None:
    """The stage that the loops waited for longest and the share of the time; None if unknown.

    A stage counts with its slowest rank: `write, rank 1`. A rank that is early waits in the
    collective for the last one, so the broadcast itself counts with the rank that waited least for
    it, of those that waited for anything.
    """
    total = sum(run.seconds for run in row.steady)
    waited: dict[tuple[int, str], float] = {}
    for part in (part for run in row.steady for part in run.ranks):
        for stage, seconds in part.waiting.items():
            waited[part.rank, stage] = waited.get((part.rank, stage), 0.0) + seconds
    waiting_ranks = {rank for (rank, _), seconds in waited.items() if seconds > 0}
    shares = {
        f"{stage}, rank {rank}": seconds / total
        for (rank, stage), seconds in sorted(waited.items())
        if stage != "broadcast" and seconds > 0
    }
    least = min((waited.get((rank, "broadcast"), 0.0) for rank in waiting_ranks), default=0.0)
    if least > 0:
        shares["broadcast"] = least / total
    return max(shares.items(), key=lambda item: item[1], default=None)


def waiting_of(totals: Mapping[Stage, StageTotal]) -> dict[str, float]:
    """How long one rank's loop waited for each stage, in seconds.

    On a GPU the loop runs ahead until the staging is full, which counts as waiting for the copy to
    or from the device. Where broadcasts took longer than the copies, they were the cause.
    """
    waiting: dict[str, float] = {
        stage: total.waiting_s for stage, total in totals.items() if total.waiting_s > 0
    }
    broadcast_s = totals["broadcast"].busy_s if "broadcast" in totals else 0.0
    for copy in ("h2d", "d2h"):
        if copy in waiting and totals[copy].busy_s < broadcast_s:
            waiting["broadcast"] = waiting.get("broadcast", 0.0) + waiting.pop(copy)
    return waiting


def busy_of(totals: Mapping[Stage, StageTotal], seconds: float) -> dict[str, float]:
    """How long each stage of one rank was busy in a run of `seconds`.

    `totals` are of another pass like that run; the shares are the same.
    """
    moved = {stage: total for stage, total in totals.items() if total.nbytes}
    begin = min((total.first_begin for total in moved.values()), default=0.0)
    whole_s = max((total.last_end for total in moved.values()), default=0.0) - begin
    if whole_s <= 0:
        return {}
    return {stage: seconds * min(1.0, total.busy_s / whole_s) for stage, total in moved.items()}
