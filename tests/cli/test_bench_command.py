"""Claims about `packcast bench` as it is typed: real ranks, real bytes."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

from tests.helpers.commands import Commands

SMALL = ("--size", "8MiB", "--buffer-size", "1MiB,2MiB", "--num-buffers", "2,3", "--runs", "2")


def test_a_bench_started_by_itself_measures_tells_and_leaves_nothing_behind(
    commands: Commands, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "r.json"
    work.mkdir()
    words = ("--dir", work, "--device", "cpu", "--export-json", out, "--export-csv", "-")
    ended = commands.packcast("bench", *SMALL, *words).wait()
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    assert (found["ok"], found["environment"]["world_size"]) == (True, 2)
    assert found["command_line"].endswith("--nproc 2")
    ours = [row for row in found["rows"] if row["method"] == "packcast"]
    points = {(row["sink"], row["buffer_size"] >> 20, row["num_buffers"]) for row in ours}
    assert points == {(k, s, n) for k in ("discard", "write") for s in (1, 2) for n in (2, 3)}
    assert {row["method"] for row in found["rows"]} >= {"packcast", "original"}
    for row in found["rows"]:
        assert row["failure"] is None, row
        assert row["wrong"] == 0
        assert row["limit"]["fraction"] > 0
        assert [run["is_warmup"] for run in row["runs"]] == [True, False, False]
        assert [part["rank"] for part in row["runs"][0]["ranks"]] == [0, 1]
        assert row["ratio_to_original"] > 0
    assert {"read", "broadcast", "write"} <= {limit["stage"] for limit in found["limits"]}
    lines = list(csv.DictReader(io.StringIO(ended.stdout)))
    assert [line["method"] for line in lines] == [row["method"] for row in found["rows"]]
    assert "* packcast" in ended.stderr
    assert list(work.iterdir()) == []


def test_ctrl_c_leaves_the_rows_so_far_and_no_files(commands: Commands, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "r.json"
    work.mkdir()
    words = ("--dir", work, "--device", "cpu", "--no-baselines", "--no-limits")
    more = ("--sink", "discard,write", "--runs", "1000", "--export-json", out)
    long = commands.packcast("bench", *SMALL[:-2], "--nproc", "2", *words, *more)
    long.read_until("8 cases to measure")
    long.send_signal(signal.SIGINT)
    ended = long.wait()
    assert ended.returncode == 130, ended.stderr
    found = json.loads(out.read_text())
    # The sender's own signal, or the news of a worker's, which may be faster.
    assert found["exit_code"] in (130, 5)
    assert found["error"].endswith("interrupted by SIGINT")
    assert f"{len(found['rows'])} of 8 rows were measured" in ended.stdout
    assert list(work.iterdir()) == []
