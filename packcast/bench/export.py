"""Results as JSON (schema 2), CSV and markdown, and the files that they are written to.

Sizes are in bytes and times in seconds; only markdown, which is for people, has other units.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from packcast.bench.model import Results, Row
from packcast.bench.stats import (
    default_lines,
    limits_of,
    measured,
    ratio_of,
    reference_of,
    waiting_on,
    warnings_of,
)
from packcast.bench.table import closing_lines, environment_lines, tables
from packcast.errors import DestinationError

SCHEMA = 2

Exports = Mapping[str, Path | None]  # the file of each option; None is standard output


def to_json(results: Results) -> str:
    """One JSON document and a line feed."""
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
        "rows": [_flat(row, rows) | {"runs": _runs(row)} for row in rows],
        "defaults": list(default_lines(rows)),
        "warnings": [*results.warnings, *warnings_of(rows)],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _flat(row: Row, rows: Sequence[Row]) -> dict[str, object]:
    """One line of CSV. The names are the schema's: the fields of Case are part of it."""
    seconds, waiting, reference = row.seconds, waiting_on(row), reference_of(row, rows)
    return {
        **asdict(row.case),
        "nbytes": row.nbytes,
        "seconds_median": seconds and seconds.median,
        "seconds_min": seconds and seconds.min,
        "seconds_max": seconds and seconds.max,
        "seconds_cv": seconds and seconds.cv,
        "bytes_per_second": row.rate,
        "limit_stage": row.limit and row.limit.stage,
        "limit_bytes_per_second": row.limit and row.limit.bytes_per_second,
        "limit_fraction": row.fraction,
        "ratio": ratio_of(row, reference),
        "ratio_to": reference and reference.case.method,
        "wrong": row.wrong,
        "waiting_on": waiting and waiting[0],
        "waiting_share": waiting and waiting[1],
        "most_sent_of_nbytes": row.most_sent,
        "loop_seconds_per_gib": row.loop_seconds_per_gib,
        "peak_device_nbytes": max((part.peak_device_nbytes for part in row.parts), default=0),
        "peak_pinned_nbytes": max((part.peak_pinned_nbytes for part in row.parts), default=0),
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
    """A line of names, then one for each row; what was not measured is empty."""
    rows = measured(results.rows)
    text = io.StringIO()
    lines = [_flat(row, rows) for row in rows]
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def to_markdown(results: Results) -> str:
    """The command, the environment, the limits, the rows."""
    blocks = [f"```\n{results.command_line}\n```"]
    if results.environment:
        facts = environment_lines(results.environment)
        blocks.append("\n".join(f"- {what}: {_cell(text)}" for what, text in facts))
    for titles, rows in tables(results):
        rule = ["--:" if title.startswith(">") else ":--" for title in titles]
        head = [title.removeprefix(">") for title in titles]
        lines = [head, rule, *([_cell(cell) for cell in row] for row in rows)]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    blocks.append("\n".join(f"- {_cell(line)}" for line in closing_lines(results)))
    if results.error:
        blocks.append(f"It failed: {_cell(results.error)}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def _cell(text: str) -> str:
    """On one line, with characters that would end the cell, or are not printable, escaped."""
    safe = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return safe.replace("|", "\\|").replace("*", "\\*")


_FORMATS: dict[str, Callable[[Results], str]] = {
    "--export-json": to_json,
    "--export-csv": to_csv,
    "--export-markdown": to_markdown,
}


def write_exports(exports: Exports, results: Results) -> None:
    """Write every file; standard output only after the end of the bench.

    Tries all of them, then raises DestinationError if one has failed.
    """
    failure: DestinationError | None = None
    for option, path in exports.items():
        if path is None:
            if results.exit_code is not None:
                sys.stdout.write(_FORMATS[option](results))
                sys.stdout.flush()
            continue
        try:
            write_file(path, _FORMATS[option](results).encode())
        except OSError as error:
            failure = DestinationError(f"{option}: {path}: {error.strerror}")
    if failure:
        raise failure


def write_file(path: Path, content: bytes) -> None:
    """Replace the file at once, so that no reader sees a part; a device or link is written itself.

    Raises OSError.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
