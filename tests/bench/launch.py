"""Benches started as real ranks over gloo, and their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packcast.units import MIB
from tests.helpers.commands import Command, Commands, wait_all

# (method, source, sink) of every row of a bench of everything, with all the baselines.
EVERY_WAY = {
    ("packcast", "file", "discard"),
    ("packcast", "file", "write"),
    ("packcast", "file", "verify"),
    ("packcast", "file", "land"),
    ("original", "file", "discard"),
    ("original", "file", "write"),
    ("original", "file", "land"),
    ("load_file", "file", "land"),
    ("compat", "resident", "discard"),
    ("packcast", "resident", "land"),
    ("original", "resident", "discard"),
    ("original", "resident", "land"),
    ("per-tensor", "resident", "land"),
}
OVER_GLOO = {("chain", "resident", "land"), ("gloo broadcast", "resident", "land")}


@dataclass(frozen=True, slots=True)
class Bench:
    """One bench of a test: its processes, files and results."""

    commands: Commands
    folder: Path

    @property
    def found_path(self) -> Path:
        return self.folder / "found.json"

    @property
    def directory(self) -> Path:
        """Where the bench may make files, and must leave none."""
        return self.folder / "made"

    def start(self, num_ranks: int = 2, **settings: Any) -> list[Command]:
        """The ranks, rank 0 first."""
        self.directory.mkdir(exist_ok=True)
        given = {
            "checkpoint": None,
            "shapes": ["dense"],
            "size": 8 * MIB,
            "sources": ["file"],
            "sinks": ["discard"],
            "readers": [1],
            "buffer_sizes": [MIB],
            "num_buffers": [2],
            "runs": 1,
            "warmup": 0,
            "limits": False,
            "baselines": False,
            "directory": str(self.directory),
            "write_directory": str(self.directory),
            "join_timeout_s": 50,
            "stall_timeout_s": 20,
        } | settings
        argv = ("-m", "tests.bench.entry", json.dumps(given), self.found_path)
        return self.commands.start_program(num_ranks, *argv)

    def run(self, num_ranks: int = 2, *, code: int = 0, **settings: Any) -> dict[str, Any]:
        """The sender's results; every rank must end with `code` and leave no file."""
        ends = wait_all(self.start(num_ranks, **settings))
        assert [end.returncode for end in ends] == [code] * num_ranks, [e.stderr for e in ends]
        self.assert_nothing_left()
        return self.found()

    def found(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.found_path.read_text())
        return found

    def num_turns(self) -> int:
        """How many runs have begun."""
        try:
            return sum("run" in text for text in self.found()["doing"])
        except FileNotFoundError:
            return 0

    def assert_nothing_left(self) -> None:
        assert list(self.directory.iterdir()) == []


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Without those that are limits."""
    return [row for row in found["rows"] if row["limit"] is None]


def rank_runs(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every rank's part in every run of a row."""
    return (part for run in row["runs"] for part in run["ranks"])


def label(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["source"], row["sink"]
