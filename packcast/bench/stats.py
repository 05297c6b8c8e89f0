"""Numbers out of runs: medians and spreads, ratios pair by pair, what binds, what is odd. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from packcast.bench.model import OURS, SENDER, Case, Limit, LimitStage, Row, Run
from packcast.packed.counters import Stage, StageTotal
from packcast.units import GIB, format_rate

# Above this spread two settings that differ by a tenth cannot be told apart by three runs.
WIDE_CV = 0.15
_LEAST_NOISE = 0.01
_ABOVE_LIMIT = 1.05
ORIGINAL = "original"
_LIMITS: tuple[LimitStage, ...] = ("read", "h2d", "broadcast", "d2h", "write", "together")


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of the runs that count. `cv` is the sample's standard deviation over its mean."""

    median: float
    min: float
    max: float
    cv: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The stage that the loops stood still for longest, where, and for what share of the time."""

    stage: str
    rank: int | None  # None: of a collective, so all ranks
    share: float

    def __str__(self) -> str:
        return self.stage if self.rank is None else f"{self.stage}, rank {self.rank}"


def steady(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Without the warm-up."""
    return tuple(run for run in runs if not run.is_warmup)


def seconds_of(row: Row) -> Seconds | None:
    """None where it has not been measured."""
    times = [run.seconds for run in steady(row.runs)]
    if not times or row.failure is not None:
        return None
    mean = statistics.fmean(times)
    spread = statistics.stdev(times) if len(times) > 1 else 0.0
    return Seconds(statistics.median(times), min(times), max(times), spread / mean)


def rate_of(row: Row) -> float | None:
    """Bytes per second of the median run."""
    seconds = seconds_of(row)
    return row.nbytes / seconds.median if seconds else None


def fraction_of(row: Row) -> float | None:
    """What part of its limit a row reached."""
    rate = rate_of(row)
    return rate / row.limit.bytes_per_second if row.limit and rate else None


def wrong_of(row: Row) -> int | None:
    """The most of any run, warm-up too: a wrong byte is a wrong byte. None: not checked."""
    if any(part.wrong is None for run in row.runs for part in run.ranks):
        return None
    return max((sum(part.wrong or 0 for part in run.ranks) for run in row.runs), default=0)


def loop_seconds_per_gib(row: Row) -> float | None:
    """CPU time of the sender's loop; None where no loop was counted."""
    found = [run.ranks[SENDER].loop_seconds for run in steady(row.runs)]
    median = statistics.median(found) if found else 0.0
    return median / (row.nbytes / GIB) if median and row.nbytes else None


def most_sent(row: Row) -> float | None:
    """The most bytes that any rank gave to others, as a multiple of the weights."""
    parts = [part.sent_nbytes for run in steady(row.runs) for part in run.ranks]
    known = [nbytes for nbytes in parts if nbytes is not None]
    return max(known) / row.nbytes if known and row.nbytes else None


def reference_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """What the row is compared with: `original`, but gloo's broadcast for a chain."""
    case = row.case
    for other in rows:
        theirs = other.case
        if case.method in ("chain", "gloo broadcast"):
            wanted = theirs.method == "gloo broadcast" and theirs.buffers == case.buffers
        else:
            wanted = theirs.method == ORIGINAL
        if wanted and theirs.combination == case.combination:
            return other
    return None


def ratio_of(row: Row, reference: Row | None) -> float | None:
    """Above 1 where the row is faster: the median of ratios, run i over run i, so that what
    disturbs both at one time falls out. None where there is no pair."""
    if reference is None or row.failure is not None:
        return None
    pairs = zip(steady(reference.runs), steady(row.runs), strict=False)
    ratios = [theirs.seconds / ours.seconds for theirs, ours in pairs]
    # Whose weights are a little larger, as files with their headers, has not been slower.
    return statistics.median(ratios) * row.nbytes / reference.nbytes if ratios else None


def shown(rows: Iterable[Row]) -> list[Row]:
    """The rows of the table; limits have one of their own."""
    return [row for row in measured(rows) if row.case.limit is None]


def measured(rows: Iterable[Row]) -> list[Row]:
    """Those with a run that counts, or with a reason why there is none."""
    return [row for row in rows if row.failure is not None or steady(row.runs)]


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows by combination, in the order in which each was met first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.combination, []).append(row)
    return groups


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """The fastest of ours that has every byte right, and those that cannot be told from it.

    By their medians, where they differ by less than the larger spread (cv) of the two runs.
    """
    able = [row for row in rows if row.case.method in OURS and rate_of(row) and not wrong_of(row)]
    if not able:
        return []
    fastest = max(able, key=lambda row: rate_of(row) or 0.0)
    return [fastest, *(row for row in able if row is not fastest and _is_near(row, fastest))]


def _is_near(row: Row, fastest: Row) -> bool:
    ours, theirs = seconds_of(row), seconds_of(fastest)
    rate, best = rate_of(row), rate_of(fastest)
    if not (ours and theirs and rate and best):
        return False
    return 1 - rate / best < max(_LEAST_NOISE, ours.cv, theirs.cv)


def binding_limit(case: Case, limits: Iterable[Limit]) -> Limit | None:
    """What a case's stages reach together, where that was measured; else the lowest of its stages.

    Of the broadcast's limits the best counts: small buffers are the case's own choice.
    """
    if case.method in ("load_file", "limit"):
        return None
    stages = {"broadcast"}
    if case.source == "file":
        stages |= {"read", "h2d", "together"}
        stages |= {"write": {"d2h", "write"}, "verify": {"d2h"}}.get(case.sink, set())
    bearing: dict[str, Limit] = {}
    for limit in limits:
        fits = limit.readers in (None, case.readers) and limit.sink in (None, case.sink)
        if limit.stage not in stages or not fits or limit.shape not in (None, case.shape):
            continue
        known = bearing.get(limit.stage)
        if known is None or limit.bytes_per_second > known.bytes_per_second:
            bearing[limit.stage] = limit
    if "together" in bearing:
        return bearing["together"]
    return min(bearing.values(), key=lambda limit: limit.bytes_per_second, default=None)


def warnings_of(rows: Sequence[Row]) -> Iterator[str]:
    """What is odd, each kind once, with what to do about it."""
    failures: dict[str, list[Row]] = {}
    for row in measured(rows):
        if row.failure is not None:
            failures.setdefault(row.failure, []).append(row)
    for failure, same in failures.items():
        yield f"{_where(same)}: {failure}"
    rows = shown(rows)
    if wrong := [row for row in rows if wrong_of(row)]:
        text = f"{wrong_of(wrong[0])} blocks or tensors are not the sender's"
        yield f"{_where(wrong)}: {text}; --export-json has the numbers of every run and rank"
    found = [(row, seconds) for row in rows if (seconds := seconds_of(row))]
    if wide := [row for row, seconds in found if seconds.cv > WIDE_CV and len(row.runs) > 2]:
        text = "the machine is noisy: stop what else runs there, or use more --runs"
        yield f"{_where(wide)}: the runs spread by more than {WIDE_CV:.0%}; {text}"
    if above := [row for row in rows if (fraction_of(row) or 0.0) > _ABOVE_LIMIT]:
        text = "the limit was measured at a bad moment: run again on a quiet machine"
        yield f"{_where(above)}: {fraction_of(above[0]):.0%} of its limit; {text}"


def _where(rows: Sequence[Row]) -> str:
    more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
    return f"{rows[0].case}{more}"


def default_lines(rows: Iterable[Row]) -> Iterator[str]:
    """For each table that has a choice: what the defaults bring, against the best row."""
    for (shape, source, sink), group in grouped(rows).items():
        default = next((row for row in group if row.case.is_default), None)
        best = best_rows(group)[:1]
        ours = [row for row in group if row.case.method in OURS]
        rate = rate_of(default) if default else None
        if default and best and rate and len(ours) > 1:
            top = rate_of(best[0]) or rate
            yield (
                f"without options {shape}, {source} to {sink}, takes {default.case.buffers}, one"
                f" reader: {format_rate(rate)}, {rate / top:.2f} of the best row"
            )


def waiting_on(row: Row) -> Waiting | None:
    """What holds a row back; None where no waiting was recorded.

    A stage counts with its worst rank. A rank that is early waits inside the collective for the
    last one to come, who does not: no rank waited longer for the broadcast proper than the one that
    waited least, of those that wait for anything.
    """
    runs = steady(row.runs)
    total = sum(run.seconds for run in runs)
    waited: dict[tuple[int, str], float] = {}
    for run in runs:
        for part in run.ranks:
            for stage, seconds in part.waiting.items():
                waited[part.rank, stage] = waited.get((part.rank, stage), 0.0) + seconds
    busy = {rank for (rank, _), seconds in waited.items() if seconds > 0}
    least = min((waited.get((rank, "broadcast"), 0.0) for rank in busy), default=0.0)
    found = [
        Waiting(stage, rank, seconds / total)
        for (rank, stage), seconds in sorted(waited.items())
        if stage != "broadcast" and seconds > 0
    ]
    if least > 0:
        found.append(Waiting("broadcast", None, least / total))
    return max(found, key=lambda waiting: waiting.share, default=None)


def waiting_of(totals: Mapping[Stage, StageTotal]) -> dict[str, float]:
    """What one rank's loop waited for, in seconds by stage.

    Beside a GPU the loop runs ahead and meets only full staging, told as a wait for the copy to
    or from the device. Where broadcasts took longer than the copies, it was they who held it up.
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
    """What one rank's streams were busy with, for methods whose loop never waits beside a GPU.

    `totals` are of a pass like the one that took `seconds`, of which these are the same shares.
    """
    moved = {stage: total for stage, total in totals.items() if total.nbytes}
    if not moved:
        return {}
    begin = min(total.first_begin for total in moved.values())
    whole_s = max(total.last_end for total in moved.values()) - begin
    if whole_s <= 0:
        return {}
    return {stage: seconds * min(1.0, total.busy_s / whole_s) for stage, total in moved.items()}


def with_limits(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Each row with the limit that binds it, of those that are known."""
    every = tuple(rows)
    limits = [limit for row in every if (limit := limit_of(row))]
    return tuple(replace(row, limit=binding_limit(row.case, limits)) for row in every)


def limit_of(row: Row) -> Limit | None:
    """The limit that a row is: its best run."""
    case, times = row.case, [run.seconds for run in row.runs]
    if case.limit is None or not times or row.failure is not None:
        return None
    is_whole = case.limit == "together"
    return Limit(
        stage=case.limit,
        bytes_per_second=row.nbytes / min(times),
        detail=f"{case.buffers}, best of {len(times)} runs",
        buffer_size=case.buffer_size if case.limit == "broadcast" else None,
        readers=case.readers if case.limit in ("read", "h2d", "together") else None,
        sink=case.sink if is_whole else None,
        shape=case.shape if is_whole else None,
    )


def limits_of(rows: Iterable[Row]) -> list[Limit]:
    """All that are known, the best of each kind."""
    best: dict[str, Limit] = {}
    for row in rows:
        limit = limit_of(row)
        if limit is not None:
            known = best.get(limit.label)
            if known is None or limit.bytes_per_second > known.bytes_per_second:
                best[limit.label] = limit
    return sorted(best.values(), key=lambda limit: _LIMITS.index(limit.stage))
