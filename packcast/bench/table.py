"""What a person reads of a bench, as cells and lines: for a terminal as for a web page. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from packcast.bench.model import Case, Environment, Results, Row
from packcast.bench.stats import (
    best_rows,
    default_lines,
    fraction_of,
    grouped,
    limits_of,
    rate_of,
    ratio_of,
    reference_of,
    seconds_of,
    shown,
    waiting_on,
    warnings_of,
    wrong_of,
)
from packcast.units import format_rate, format_size

LEGEND = (
    "* the fastest of packcast's rows; ~ not to be told from it, as the runs spread",
    "of limit: part of what the row's stages reach together without packcast, or else of the"
    " slowest one",
    "x: times as fast as `original`, the algorithm that packed broadcasts were first made with"
    " (a chain: as gloo's broadcast)",
    "wrong: blocks or tensors that are not the sender's, of every run; -: not checked",
)


def environment_lines(environment: Environment) -> list[tuple[str, str]]:
    """As lines of a header: what, and the words for it."""
    lines = [("versions", ", ".join(f"{k} {v}" for k, v in environment.versions.items()))]
    lines.append(("group", f"{environment.world_size} ranks, {environment.backend}"))
    hosts: dict[str, list[Mapping[str, object]]] = {}
    for rank in environment.ranks:
        hosts.setdefault(str(rank.get("host", "?")), []).append(rank)
    lines += [("host", f"{host}: {_machine(ranks)}") for host, ranks in hosts.items()]
    systems = (f"{path} ({kind})" for path, kind in environment.file_systems.items())
    return [*lines, ("files in", ", ".join(systems))]


def _machine(ranks: Sequence[Mapping[str, object]]) -> str:
    """`2 ranks on cuda:0, cuda:1 (2 x NVIDIA H100), 64 cores, native I/O threads`."""
    devices = ", ".join(dict.fromkeys(str(rank.get("device", "?")) for rank in ranks))
    gpus = Counter(str(rank["gpu"]) for rank in ranks if rank.get("gpu"))
    names = ", ".join(f"{number} x {name}" if number > 1 else name for name, number in gpus.items())
    words = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {devices}" + (
        f" ({names})" * bool(names)
    )
    for fact, unit in (("cores", "cores"), ("pool", "I/O threads")):
        found = sorted({str(rank[fact]) for rank in ranks if rank.get(fact)})
        words += f", {' and '.join(found)} {unit}" if found else ""
    return words


ROW_TITLES = (
    " ",
    "method",
    "from",
    "to",
    "buffers",
    ">GB/s",
    ">cv",
    "of limit",
    ">x",
    ">wrong",
    "waiting on",
    ">device",
    ">pinned",
)
LIMIT_TITLES = ("limit", ">GB/s", "how")


def row_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of the table, by ROW_TITLES; a failure stands in the last ones' place."""
    marks: dict[Case, str] = {}
    for group in grouped(rows).values():
        best = best_rows(group)
        marks |= {row.case: "*" if len(best) == 1 else "~" for row in best}
    return [_cells(row, marks.get(row.case, ""), rows) for row in shown(rows)]


def _cells(row: Row, mark: str, rows: Sequence[Row]) -> list[str]:
    case, seconds, rate = row.case, seconds_of(row), rate_of(row)
    readers = f", {case.readers} readers" if case.readers > 1 else ""
    default = " (default)" if case.is_default else ""
    start = [mark, case.method, f"{case.shape} {case.source}", f"{case.sink}{readers}"]
    start.append(case.buffers + default)
    if seconds is None or rate is None:
        return [*start, "-", "", f"{row.failure}", *[""] * 5]
    fraction, ratio, waiting = fraction_of(row), ratio_of(row, reference_of(row, rows)), ""
    if found := waiting_on(row):
        waiting = f"{found} ({found.share:.0%})"
    parts = [part for run in row.runs for part in run.ranks]
    device = max(part.peak_device_nbytes for part in parts)
    pinned = max(part.peak_pinned_nbytes for part in parts)
    return [
        *start,
        gigabytes(rate),
        f"{seconds.cv:.0%}" if len(row.runs) > 2 else "-",
        f"{fraction:.0%} {row.limit.stage}" if row.limit and fraction else "-",
        f"{ratio:.2f}" if ratio is not None else "-",
        "-" if (wrong := wrong_of(row)) is None else str(wrong),
        waiting,
        format_size(device) if device else "",
        format_size(pinned) if pinned else "",
    ]


def limit_cells(results: Results) -> list[list[str]]:
    """By LIMIT_TITLES."""
    limits = limits_of(results.rows)
    return [[one.label, gigabytes(one.bytes_per_second), one.detail] for one in limits]


def without_empty(
    titles: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which no row has anything to say."""
    kept = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    return [titles[i] for i in kept], [[row[i] for i in kept] for row in rows]


def closing_lines(results: Results) -> list[str]:
    """What is said below the table: defaults, what is missing, warnings, and the words' meaning."""
    rows = shown(results.rows)
    lines = list(default_lines(results.rows))
    num_done = sum(row.is_complete for row in results.rows)
    if num_done < results.num_cases:
        lines.append(f"{num_done} of {results.num_cases} cases were measured")
    lines += [f"warning: {text}" for text in (*results.warnings, *warnings_of(results.rows))]
    return [*lines, *LEGEND] if rows else lines


def gigabytes(bytes_per_second: float) -> str:
    """A rate without its unit, for a column that names it."""
    return format_rate(bytes_per_second).removesuffix(" GB/s")
