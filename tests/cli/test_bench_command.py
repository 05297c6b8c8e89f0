"""Claims about `packcast bench` as it is typed: real ranks, real bytes."""

from __future__ import annotations

import csv
import io
import json
import random
import signal
import sys
from pathlib import Path

from tests.helpers.commands import Commands, free_port, slurm_task

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
TINY = ("--size", "4MiB", "--buffer-size", "1MiB", "--num-buffers", "2", "--runs", "1")
SMALL = ("--size", "8MiB", "--buffer-size", "1MiB,2MiB", "--num-buffers", "2,3", "--runs", "1")


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
    swept = {(s, n) for s in (1, 2) for n in (2, 3)} | {(16, 4)}  # and what is the default
    assert points == {(sink, *point) for sink in ("discard", "write") for point in swept}
    assert {row["method"] for row in found["rows"]} >= {"packcast", "original"}
    for row in found["rows"]:
        assert row["failure"] is None, row
        assert row["wrong"] == 0
        assert row["method"] == "limit" or row["limit_fraction"] > 0
        assert [run["is_warmup"] for run in row["runs"]] == [True, False]
        assert [part["rank"] for part in row["runs"][0]["ranks"]] == [0, 1]
        assert row["method"] == "limit" or row["ratio"] > 0
    assert {"read", "broadcast", "write"} <= {limit["stage"] for limit in found["limits"]}
    lines = list(csv.DictReader(io.StringIO(ended.stdout)))
    assert [line["method"] for line in lines] == [row["method"] for row in found["rows"]]
    assert "x: times as fast as `original`" in ended.stderr
    assert list(work.iterdir()) == []


def test_ctrl_c_leaves_the_rows_so_far_and_no_files(commands: Commands, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "r.json"
    work.mkdir()
    words = ("--dir", work, "--device", "cpu", "--no-baselines", "--no-limits")
    more = ("--sink", "discard,write", "--runs", "1000", "--export-json", out)
    long = commands.packcast("bench", *SMALL[:-2], "--nproc", "2", *words, *more)
    long.read_until("10 cases to measure")
    long.send_signal(signal.SIGINT)
    ended = long.wait()
    assert ended.returncode == 130, ended.stderr
    found = json.loads(out.read_text())
    # The sender's own signal, or the news of a worker's, which may be faster.
    assert found["exit_code"] in (130, 5)
    assert found["error"].endswith("interrupted by SIGINT")
    assert "0 of 10 cases were measured" in ended.stdout
    assert list(work.iterdir()) == []


def measured_by_three(found_path: Path, work: Path) -> None:
    found = json.loads(found_path.read_text())
    assert (found["ok"], found["environment"]["world_size"]) == (True, 3)
    assert {row["method"] for row in found["rows"]} == {"packcast", "original"}
    for row in found["rows"]:
        assert (row["failure"], row["wrong"]) == (None, 0), row
    assert list(work.iterdir()) == []


def test_it_runs_under_torchrun(commands: Commands, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "r.json"
    work.mkdir()
    words = ("--dir", str(work), "--device", "cpu", "--no-limits", "--export-json", str(out))
    ended = commands.start_warm([*TORCHRUN, "-m", "packcast", "bench", *TINY, *words]).wait()
    assert ended.returncode == 0, ended.stderr
    measured_by_three(out, work)


def test_it_runs_under_slurm(commands: Commands, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "r.json"
    work.mkdir()
    job, port = str(random.randrange(10**6)), str(free_port())
    words = ("--dir", str(work), "--device", "cpu", "--no-limits", "--export-json", str(out))
    argv = [sys.executable, "-m", "packcast", "bench", *TINY, *words, "--port", port]
    for rank in [commands.start_warm(argv, slurm_task(job, rank, 3)) for rank in range(3)]:
        ended = rank.wait()
        assert ended.returncode == 0, ended.stderr
    measured_by_three(out, work)
