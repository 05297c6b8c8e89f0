"""Results as JSON (schema 2), CSV and markdown: pure functions from results to text.

Sizes are in bytes and times in seconds; only markdown, which people read, has units of its own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from packcast.bench.model import Case, Results, Row
from packcast.bench.stats import (
    default_lines,
    fraction_of,
    limits_of,
    loop_seconds_per_gib,
    measured,
    most_sent,
    rate_of,
    ratio_of,
    reference_of,
    seconds_of,
    waiting_on,
    warnings_of,
    wrong_of,
)
from packcast.bench.table import (
    LIMIT_TITLES,
    ROW_TITLES,
    closing_lines,
    environment_lines,
    limit_cells,
    row_cells,
    without_empty,
)

SCHEMA = 2


def to_json(results: Results) -> str:
    """One JSON document, ended by a line feed."""
    rows = measured(results.rows)
    document = {
        "schema": SCHEMA,
        "command": "bench",
        "command_line": results.command_line,
        "ok": None if results.exit_code is None else results.exit_code == 0,
        "exit_code": results.exit_code,
        "error": results.error,
        "environment": asdict(results.environment) if results.environment else None,
        "num_cases": results.num_cases,
        "limits": [asdict(limit) for limit in limits_of(rows)],
        "rows": [_row(row, rows) | {"runs": _runs(row)} for row in rows],
        "defaults": list(default_lines(rows)),
        "warnings": [*results.warnings, *warnings_of(rows)],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _case(case: Case) -> dict[str, object]:
    return {
        "method": case.method,
        "shape": case.shape,
        "source": case.source,
        "sink": case.sink,
        "readers": case.readers,
        "buffer_size": case.buffer_size,
        "num_buffers": case.num_buffers,
        "is_default": case.is_default,
        "limit": case.limit,
    }


def _row(row: Row, rows: Sequence[Row]) -> dict[str, object]:
    """By name, for the schema is not the model; a flat line, as CSV wants it."""
    seconds, waiting, reference = seconds_of(row), waiting_on(row), reference_of(row, rows)
    parts = [part for run in row.runs for part in run.ranks]
    return {
        **_case(row.case),
        "nbytes": row.nbytes,
        "seconds_median": seconds and seconds.median,
        "seconds_min": seconds and seconds.min,
        "seconds_max": seconds and seconds.max,
        "seconds_cv": seconds and seconds.cv,
        "bytes_per_second": rate_of(row),
        "limit_stage": row.limit and row.limit.stage,
        "limit_bytes_per_second": row.limit and row.limit.bytes_per_second,
        "limit_fraction": fraction_of(row),
        "ratio": ratio_of(row, reference),
        "ratio_to": reference and reference.case.method,
        "wrong": wrong_of(row),
        "waiting_on": str(waiting) if waiting else None,
        "waiting_share": waiting and waiting.share,
        "most_sent_of_nbytes": most_sent(row),
        "loop_seconds_per_gib": loop_seconds_per_gib(row),
        "peak_device_nbytes": max((part.peak_device_nbytes for part in parts), default=0),
        "peak_pinned_nbytes": max((part.peak_pinned_nbytes for part in parts), default=0),
        "failure": row.failure,
    }


def _runs(row: Row) -> list[dict[str, object]]:
    return [
        {
            "is_warmup": run.is_warmup,
            "seconds": run.seconds,
            "ranks": [asdict(part) for part in run.ranks],
        }
        for run in row.runs
    ]


def to_csv(results: Results) -> str:
    """A line per row, after the names; what was not measured is empty."""
    rows = measured(results.rows)
    text = io.StringIO()
    lines = [_row(row, rows) for row in rows]
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def to_markdown(results: Results) -> str:
    """The command, the environment, the limits, the table."""
    blocks = [f"```\n{results.command_line}\n```"]
    if results.environment:
        facts = environment_lines(results.environment)
        blocks.append("\n".join(f"- {what}: {_cell(words)}" for what, words in facts))
    for titles, cells in (
        (LIMIT_TITLES, limit_cells(results)),
        (ROW_TITLES, row_cells(results.rows)),
    ):
        if cells:
            blocks.append(_table(*without_empty(titles, cells)))
    blocks.append("\n".join(f"- {_cell(line)}" for line in closing_lines(results)))
    if results.error:
        blocks.append(f"It failed: {_cell(results.error)}")
    return "\n\n".join(block for block in blocks if block) + "\n"


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
    return safe.replace("|", "\\|").replace("*", "\\*")
