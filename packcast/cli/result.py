"""The JSON result of a Report, schema 1. Pure functions."""

from __future__ import annotations

import json
from dataclasses import asdict

import packcast
from packcast.comparison import Comparison
from packcast.errors import PackcastError
from packcast.report import Report

SCHEMA = 1


def to_json(document: dict[str, object]) -> str:
    """One JSON document with a final line feed. File names that are not valid text are escaped."""
    head = {"schema": SCHEMA, "version": packcast.__version__}
    return json.dumps({**head, **document}, indent=2, allow_nan=False) + "\n"


def ending(command: str, error: PackcastError | None) -> dict[str, object]:
    """The fields that every result has: how the command ended."""
    return {
        "command": command,
        "ok": error is None,
        "exit_code": error.exit_code if error else 0,
        "error": error.message if error else None,
        "hint": error.hint if error else None,
    }


def report_document(report: Report) -> dict[str, object]:
    """The result of `send` or `recv`: sizes in bytes, times in seconds."""
    return {
        "command": report.command,
        "started": report.started,
        "ok": report.ok,
        "exit_code": report.exit_code,
        "error": report.error,
        "hint": report.hint,
        "rank": report.rank,
        "checkpoint": {
            "path": report.checkpoint,
            "files": report.num_files,
            "tensors": report.num_tensors,
            "bytes": report.nbytes,
        },
        "group": {
            "backend": report.backend,
            "reason": report.reason,
            "world_size": report.world_size,
            "ranks": [asdict(rank) for rank in report.ranks],
        },
        "buffers": {
            "size": report.buffer_size,
            "count": report.num_buffers,
            "staging": report.staging,
        },
        "pool": report.pool,
        "digest": report.digest,
        "seconds": report.seconds,
        "total_seconds": report.total_seconds,
        "bytes_per_second": report.bytes_per_second,
        "stages": {
            name: asdict(stage) | {"bytes_per_second": stage.bytes_per_second}
            for name, stage in report.stages.items()
        },
        "peak_device_bytes": report.peak_device_nbytes,
        "peak_pinned_bytes": report.peak_pinned_nbytes,
        "digests": dict(report.digests),
        "comparison": report.comparison and comparison_document(report.comparison),
        "workers": {str(rank): dict(facts) for rank, facts in report.workers.items()},
        "warnings": list(report.warnings),
    }


def comparison_document(comparison: Comparison) -> dict[str, object]:
    """One copy, with all that differs."""
    return {
        "path": comparison.path,
        "against": comparison.against,
        "equal": comparison.equal,
        "files": len(comparison.files),
        "missing": [file.name for file in comparison.marked("-")],
        "extra": [file.name for file in comparison.marked("+")],
        "differing": [
            {
                "file": file.name,
                "offset": file.offset,
                "reason": file.reason,
                "tensors": file.tensors_marked("*", "-", "+"),
            }
            for file in comparison.marked("*")
        ],
        "unreadable": {file.name: file.reason for file in comparison.marked("!")},
    }


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """`1 file`, `3 files`; `nouns` is an irregular plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {nouns or noun + 's'}"
