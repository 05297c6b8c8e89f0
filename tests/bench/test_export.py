"""What results become: JSON, CSV, a table for people, a picture; and the files that they go to."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from packcast.bench.export import to_csv, to_json, to_markdown, write_file
from packcast.bench.model import Results
from packcast.bench.plot import write_plot
from packcast.bench.table import closing_lines, row_cells
from packcast.cli import benchsettings
from packcast.units import GIB, MIB
from tests.bench.samples import a_bench, case, row


def test_json_has_the_environment_and_every_run_of_every_rank() -> None:
    results = replace(a_bench(), exit_code=0)
    found = json.loads(to_json(results))
    assert (found["schema"], found["ok"], found["command_line"]) == (2, True, "packcast bench")
    assert found["environment"]["versions"]["torch"] == "2.11.0"
    assert [rank["gpu"] for rank in found["environment"]["ranks"]] == ["NVIDIA H100"] * 2
    assert len(found["rows"]) == len(results.rows) == found["num_cases"]
    best = next(one for one in found["rows"] if one["buffer_size"] == 16 * MIB)
    best = found["rows"][3]
    assert (best["buffer_size"], best["num_buffers"], best["nbytes"]) == (16 * MIB, 4, 8 * GIB)
    assert best["bytes_per_second"] == pytest.approx(43.6e9)
    assert (best["limit_stage"], best["ratio_to"]) == ("read", "original")
    assert best["limit_bytes_per_second"] == pytest.approx(44e9)
    assert best["ratio"] == pytest.approx(10.38, rel=1e-2)
    assert best["seconds_median"] == pytest.approx(8 * GIB / 43.6e9)
    assert best["loop_seconds_per_gib"] == pytest.approx(0.005)
    assert best["wrong"] == 0
    assert [one["is_warmup"] for one in best["runs"]] == [True, False, False, False]
    assert [part["rank"] for part in best["runs"][1]["ranks"]] == [0, 1]
    assert {limit["stage"] for limit in found["limits"]} == {"read", "broadcast", "together"}
    failed = found["rows"][6]
    assert failed["failure"] == "rank 1: no room for 4 buffers of 16GiB"
    assert failed["seconds_median"] is None
    assert found["defaults"]
    assert len(found["warnings"]) == 1


def test_json_before_the_end_says_so() -> None:
    found = json.loads(to_json(Results(command_line="packcast bench")))
    assert (found["ok"], found["exit_code"], found["rows"]) == (None, None, [])


def test_csv_has_a_line_for_each_row_with_the_same_names() -> None:
    results = a_bench()
    lines = list(csv.DictReader(io.StringIO(to_csv(results))))
    rows = json.loads(to_json(results))["rows"]
    assert [line["method"] for line in lines] == [one["method"] for one in rows]
    assert set(lines[0]) == set(rows[0]) - {"runs"}
    assert lines[6]["bytes_per_second"] == ""
    assert to_csv(Results()) == ""


def test_the_table_has_no_limits_and_marks_the_fastest_of_each() -> None:
    cells = row_cells(a_bench().rows)
    assert len(cells) == 11
    assert [line[4] for line in cells if line[0] == "*"] == ["16MiB x 4", "64MiB x 4"]
    best = next(line for line in cells if line[0] == "*")
    assert best[1:] == [
        "packcast",
        "dense file",
        "discard",
        "16MiB x 4",
        "43.6",
        "3%",
        "99% read",
        "10.38",
        "0",
        "read, rank 1 (50%)",
        "260 MiB",
        "512 MiB",
    ]
    assert [line[4] for line in cells if "default" in line[4]] == ["64MiB x 4 (default)"]
    failed = next(line for line in cells if "16GiB" in line[4])
    assert failed[5:8] == ["-", "", "rank 1: no room for 4 buffers of 16GiB"]


def test_equal_rows_and_single_runs_are_marked_as_what_they_are() -> None:
    rows = [row(case(num_buffers=n), [40.0, 40.1]) for n in (2, 4)]
    rows.append(replace(row(case(num_buffers=8), [9.0]), runs=row(case(), [9.0]).runs[1:]))
    cells = row_cells(rows)
    assert [line[0] for line in cells] == ["~", "~", ""]
    assert cells[2][6] == "-"  # one run has no spread


def test_the_words_of_the_table_are_explained_below_it() -> None:
    lines = closing_lines(a_bench())
    for word in (
        "* packcast's fastest",
        "~ as fast",
        "of limit:",
        "x: times",
        "`original`",
        "wrong:",
    ):
        assert any(word in line for line in lines), word
    assert any(line.startswith("without options dense, file to discard") for line in lines)
    partial = replace(a_bench(), num_cases=99)
    assert "14 of 99 cases were measured" in closing_lines(partial)


def test_markdown_is_safe_and_complete() -> None:
    text = to_markdown(replace(a_bench(), error="it | broke"))
    assert "node\\|1" in text
    assert "It failed: it \\| broke" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert any("| 43.6 |" in line and "| \\* |" in line for line in table)
    assert len({line.replace("\\|", "").count("|") for line in table}) == 2  # two tables


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path, link = tmp_path / "r.json", tmp_path / "link"
    link.symlink_to(path)
    write_file(path, b"old")
    write_file(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    write_file(Path("/dev/null"), b"gone")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "r.json"]


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = benchsettings.plot("--plot", str(tmp_path / f"p{suffix}"))
        write_plot(path, a_bench())
        assert path.read_bytes().startswith(magic)
    write_plot(path, Results())
