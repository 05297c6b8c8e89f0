"""The cells and lines of a bench's tables, for a terminal and for markdown. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from packcast.bench.model import Case, Environment, Results, Row
from packcast.bench.stats import (
    best_rows,
    default_lines,
    grouped,
    limits_of,
    ratio_of,
    reference_of,
    shown,
    waiting_on,
    warnings_of,
)
from packcast.units import format_rate, format_size

LEGEND = (
    "* packcast's fastest row; ~ as fast, within the spread of the runs",
    "of limit: compared with what the row's stages reach together without packcast, or else with"
    " the slowest stage",
    "x: times as fast as `original`, the algorithm that packed broadcasts were first made with"
    " (a chain: as gloo's broadcast)",
    "wrong: blocks or tensors that differ from the sender's, in any run; -: not checked",
)
# A title that begins with `>` aligns to the right.
LIMIT_TITLES = ("limit", ">GB/s", "how")
ROW_TITLES = (
    *(" ", "method", "from", "to", "buffers", ">GB/s", ">cv", "of limit", ">x", ">wrong"),
    *("waiting on", ">device", ">pinned"),
)

WRAPPED = ("from", "buffers", "of limit", "how")  # in a cell of these a line may be broken
_FIRST_TO_GO = (
    *(">pinned", ">device", ">cv", ">x", "waiting on"),
    *("from", "to", ">wrong", "method", "of limit"),
)

Table = tuple[list[str], list[list[str]]]  # titles, and the cells of each row


def tables(results: Results) -> list[Table]:
    """Limits and rows, without tables that have no row and columns that have no content."""
    limits = [
        [limit.label, _gigabytes(limit.bytes_per_second), limit.detail]
        for limit in limits_of(results.rows)
    ]
    found = []
    for titles, rows in ((LIMIT_TITLES, limits), (ROW_TITLES, row_cells(results.rows))):
        kept = [i for i in range(len(titles)) if any(row[i] for row in rows)]
        if rows:
            found.append(([titles[i] for i in kept], [[row[i] for i in kept] for row in rows]))
    return found


def fitting(content: Table, width: int, *, gap: int) -> tuple[Table, list[str]]:
    """The columns that `width` has room for, and the titles of the others."""
    titles, rows = content
    kept = list(range(len(titles)))

    def least(i: int) -> int:
        cells = [titles[i].removeprefix(">"), *(row[i] for row in rows)]
        if titles[i] in WRAPPED:
            cells = [word for cell in cells for word in cell.split()]
        return max(map(len, cells))

    left_out = []
    for title in _FIRST_TO_GO:
        if sum(map(least, kept)) + gap * (len(kept) - 1) <= width:
            break
        if title in titles:
            kept.remove(titles.index(title))
            left_out.append(title.removeprefix(">"))
    return ([titles[i] for i in kept], [[row[i] for i in kept] for row in rows]), left_out


def environment_lines(environment: Environment) -> list[tuple[str, str]]:
    """The lines of the header: subject and text."""
    hosts: dict[str, list[Mapping[str, object]]] = {}
    for rank in environment.ranks:
        hosts.setdefault(str(rank.get("host", "?")), []).append(rank)
    systems = environment.file_systems.items()
    return [
        ("versions", ", ".join(f"{k} {v}" for k, v in environment.versions.items())),
        ("group", f"{environment.world_size} ranks, {environment.backend}"),
        *(("host", f"{host}: {_machine(ranks)}") for host, ranks in hosts.items()),
        ("files in", ", ".join(f"{path} ({kind})" for path, kind in systems)),
    ]


def _machine(ranks: Sequence[Mapping[str, object]]) -> str:
    """`2 ranks on cuda:0, cuda:1 (2 x NVIDIA H100), 64 cores, native I/O threads`."""
    devices = ", ".join(dict.fromkeys(str(rank.get("device", "?")) for rank in ranks))
    text = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {devices}"
    if gpus := Counter(str(rank["gpu"]) for rank in ranks if rank.get("gpu")):
        names = (f"{count} x {name}" if count > 1 else name for name, count in gpus.items())
        text += f" ({', '.join(names)})"
    for fact, unit in (("cores", "cores"), ("pool", "I/O threads")):
        values = sorted({str(rank[fact]) for rank in ranks if rank.get(fact)})
        text += f", {' and '.join(values)} {unit}" if values else ""
    return text


def row_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of the main table, by ROW_TITLES; a failure takes the place of the numbers."""
    marks: dict[Case, str] = {}
    for group in grouped(rows).values():
        best = best_rows(group)
        marks |= {row.case: "*" if len(best) == 1 else "~" for row in best}
    return [_cells(row, marks.get(row.case, ""), rows) for row in shown(rows)]


def _cells(row: Row, mark: str, rows: Sequence[Row]) -> list[str]:
    case, seconds = row.case, row.seconds
    buffers = case.buffers + " (default)" * case.is_default
    start = [mark, case.method, f"{case.shape} {case.source}", case.sink + case.more_readers]
    if seconds is None or row.rate is None:
        return [*start, buffers, "-", "", str(row.failure), *[""] * 5]
    fraction, ratio, waiting = row.fraction, ratio_of(row, reference_of(row, rows)), waiting_on(row)
    device = max(part.peak_device_nbytes for part in row.parts)
    pinned = max(part.peak_pinned_nbytes for part in row.parts)
    return [
        *(*start, buffers, _gigabytes(row.rate)),
        f"{seconds.cv:.0%}" if len(row.runs) > 2 else "-",
        f"{fraction:.0%} {row.limit.stage}" if row.limit and fraction else "-",
        f"{ratio:.2f}" if ratio is not None else "-",
        "-" if row.wrong is None else str(row.wrong),
        f"{waiting[0]} ({waiting[1]:.0%})" if waiting else "",
        format_size(device) if device else "",
        format_size(pinned) if pinned else "",
    ]


def closing_lines(results: Results) -> list[str]:
    """The lines below the tables: defaults, missing cases, warnings, and the legend."""
    lines = list(default_lines(results.rows))
    num_done = sum(row.is_complete for row in results.rows)
    if num_done < results.num_cases:
        lines.append(f"{num_done} of {results.num_cases} cases were measured")
    lines += [f"warning: {text}" for text in (*results.warnings, *warnings_of(results.rows))]
    return [*lines, *LEGEND] if shown(results.rows) else lines


def _gigabytes(bytes_per_second: float) -> str:
    """Without the unit, which the title names."""
    return format_rate(bytes_per_second).removesuffix(" GB/s")
