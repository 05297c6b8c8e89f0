"""Results as JSON (schema 1), CSV and markdown: pure functions from results to text.

Sizes are in bytes and times in seconds; only markdown, which people read, has units of its own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from packcast.bench.model import Case, Environment, Limit, Run
from packcast.bench.results import (
    Results,
    buffer_words,
    facts,
    limit_label,
    share_of_limit,
    warning_lines,
)
from packcast.bench.rows import Row, grouped
from packcast.units import format_rate, format_size

SCHEMA = 1

_COLUMNS = (
    "method",
    "shape",
    "source",
    "sink",
    "readers",
    "buffer_size",
    "num_buffers",
    "nbytes",
    "seconds_median",
    "seconds_min",
    "seconds_max",
    "seconds_p95",
    "seconds_cv",
    "first_seconds",
    "slowest_rank",
    "bytes_per_second",
    "limit_stage",
    "limit_bytes_per_second",
    "limit_fraction",
    "ratio_to_original",
    "wrong",
    "waiting_on",
    "peak_device_bytes",
    "peak_pinned_bytes",
    "loop_seconds_per_gib",
    "best",
    "failure",
)


def to_json(results: Results) -> str:
    """One JSON document, ended by a line feed."""
    document = {
        "schema": SCHEMA,
        "command": "bench",
        "command_line": results.command_line,
        "ok": None if results.exit_code is None else results.exit_code == 0,
        "exit_code": results.exit_code,
        "error": results.error,
        "environment": _environment(results.environment) if results.environment else None,
        "num_cases": results.num_cases,
        "limits": [_limit(limit) for limit in results.limits],
        "rows": [_row(row) for row in results.rows],
        "warnings": list(results.warnings),
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _environment(environment: Environment) -> dict[str, object]:
    return {
        "versions": dict(environment.versions),
        "backend": environment.backend,
        "world_size": environment.world_size,
        "ranks": [dict(rank) for rank in environment.ranks],
        "file_systems": dict(environment.file_systems),
    }


def _limit(limit: Limit) -> dict[str, object]:
    return {
        "stage": limit.stage,
        "bytes_per_second": limit.bytes_per_second,
        "buffer_size": limit.buffer_size,
        "readers": limit.readers,
        "sink": limit.sink,
        "detail": limit.detail,
        "per_rank": {str(rank): rate for rank, rate in limit.per_rank.items()},
    }


def _case(case: Case) -> dict[str, object]:
    """In the order of JSON's and CSV's fields; by name, for the schema is not the model."""
    return {
        "method": case.method,
        "shape": case.shape,
        "source": case.source,
        "sink": case.sink,
        "readers": case.readers,
        "buffer_size": case.buffer_size,
        "num_buffers": case.num_buffers,
    }


def _row(row: Row) -> dict[str, object]:
    seconds, limit, waiting = row.seconds, row.limit, row.waiting_on
    return {
        **_case(row.case),
        "nbytes": row.nbytes,
        "seconds": {
            "median": seconds.median,
            "min": seconds.min,
            "max": seconds.max,
            "p95": seconds.p95,
            "cv": seconds.cv,
        }
        if seconds
        else None,
        "first_seconds": row.first_seconds,
        "slowest_rank": row.slowest_rank,
        "bytes_per_second": row.bytes_per_second,
        "limit": {
            "stage": limit.stage,
            "bytes_per_second": limit.bytes_per_second,
            "fraction": limit.fraction,
        }
        if limit
        else None,
        "limits": [_limit(limit) for limit in row.limits],
        "ratio_to_original": row.ratio_to_original,
        "wrong": row.wrong,
        "waiting_on": str(waiting) if waiting else None,
        "waiting_share": waiting.share if waiting else None,
        "peak_device_bytes": row.peak_device_nbytes,
        "peak_pinned_bytes": row.peak_pinned_nbytes,
        "loop_seconds_per_gib": row.loop_seconds_per_gib,
        "best": row.is_best,
        "failure": row.failure,
        "warnings": [
            {"kind": one.kind, "text": one.text, "advice": one.advice} for one in row.warnings
        ],
        "runs": [_run(run) for run in row.runs],
    }


def _run(run: Run) -> dict[str, object]:
    return {
        "is_warmup": run.is_warmup,
        "seconds": run.seconds,
        "ranks": [
            {
                "rank": part.rank,
                "seconds": part.seconds,
                "wrong": part.wrong,
                "waiting_seconds": dict(part.waiting),
                "busy_seconds": dict(part.busy),
                "loop_seconds": part.loop_seconds,
                "peak_device_bytes": part.peak_device_nbytes,
                "peak_pinned_bytes": part.peak_pinned_nbytes,
            }
            for part in run.ranks
        ],
    }


def to_csv(results: Results) -> str:
    """A line per row, after the names; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        seconds, limit = row.seconds, row.limit
        writer.writerow(
            {
                **_case(row.case),
                "nbytes": row.nbytes,
                "seconds_median": seconds and seconds.median,
                "seconds_min": seconds and seconds.min,
                "seconds_max": seconds and seconds.max,
                "seconds_p95": seconds and seconds.p95,
                "seconds_cv": seconds and seconds.cv,
                "first_seconds": row.first_seconds,
                "slowest_rank": row.slowest_rank,
                "bytes_per_second": row.bytes_per_second,
                "limit_stage": limit and limit.stage,
                "limit_bytes_per_second": limit and limit.bytes_per_second,
                "limit_fraction": limit and limit.fraction,
                "ratio_to_original": row.ratio_to_original,
                "wrong": row.wrong if seconds else None,
                "waiting_on": row.waiting_on,
                "peak_device_bytes": row.peak_device_nbytes if seconds else None,
                "peak_pinned_bytes": row.peak_pinned_nbytes if seconds else None,
                "loop_seconds_per_gib": row.loop_seconds_per_gib,
                "best": int(row.is_best),
                "failure": row.failure,
            }
        )
    return text.getvalue()


_MARKDOWN_TITLES = (
    "method",
    ">readers",
    ">buffer",
    ">count",
    ">GB/s",
    ">min - max",
    ">cv",
    "of the limit",
    ">x",
    ">wrong",
    "waiting on",
    ">device",
    ">pinned",
)


def to_markdown(results: Results) -> str:
    """The command, the environment, the limits, and a table per combination, best row in bold."""
    blocks = [f"```\n{results.command_line}\n```"]
    if results.environment:
        lines = (f"- {what}: {_cell(words)}" for what, words in facts(results.environment))
        blocks.append("\n".join(lines))
    if results.limits:
        limits = [
            (limit_label(limit), format_rate(limit.bytes_per_second), limit.detail)
            for limit in results.limits
        ]
        blocks.append(_table(("limit", ">GB/s", "how"), [_unit_free(line) for line in limits]))
    for (shape, source, sink), rows in grouped(results.rows).items():
        size = format_size(max(row.nbytes for row in rows))
        blocks.append(f"**{_cell(shape)}, {source} to {sink}**, {size}")
        blocks.append(_table(_MARKDOWN_TITLES, [_markdown_row(row) for row in rows]))
    if warnings := warning_lines(results):
        blocks.append("\n".join(f"- {_cell(line)}" for line in warnings))
    if len(results.rows) < results.num_cases:
        blocks.append(f"{len(results.rows)} of {results.num_cases} rows were measured.")
    if results.error:
        blocks.append(f"It failed: {_cell(results.error)}")
    return "\n\n".join(blocks) + "\n"


def _unit_free(line: tuple[str, str, str]) -> tuple[str, str, str]:
    what, rate, how = line
    return what, rate.removesuffix(" GB/s"), how


def _markdown_row(row: Row) -> list[str]:
    case = row.case
    start = [case.method, str(case.readers), *buffer_words(case)]
    if row.seconds is None or row.bytes_per_second is None:
        return [*start, "-", f"{row.failure}", *[""] * 7]
    seconds = row.seconds
    limit, ratio = row.limit, row.ratio_to_original
    cells = [
        *start,
        gigabytes(row.bytes_per_second),
        f"{gigabytes(row.nbytes / seconds.max)} - {gigabytes(row.nbytes / seconds.min)}",
        f"{seconds.cv:.1%}",
        share_of_limit(limit) if limit else "",
        f"{ratio:.2f}" if ratio is not None else "",
        str(row.wrong),
        str(row.waiting_on or ""),
        format_size(row.peak_device_nbytes) if row.peak_device_nbytes else "-",
        format_size(row.peak_pinned_nbytes) if row.peak_pinned_nbytes else "-",
    ]
    if row.is_best:
        cells[:5] = [f"**{cell}**" for cell in cells[:5]]
    return cells


def gigabytes(bytes_per_second: float) -> str:
    """A rate without its unit, for a column that names it."""
    return format_rate(bytes_per_second).removesuffix(" GB/s")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; a title that begins with `>` aligns to the right."""
    head = [title.removeprefix(">") for title in titles]
    rule = ["--:" if title.startswith(">") else ":--" for title in titles]
    lines = [head, rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """One line, without what would end the cell; control characters shown as escapes."""
    safe = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return safe.replace("|", "\\|")
