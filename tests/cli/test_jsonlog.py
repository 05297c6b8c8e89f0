"""`--log-json`: one object per line, by one rank or by each, whatever becomes of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packcast.cli import jsonlog
from packcast.cli.app import run
from packcast.cli.jsonlog import JsonLog, Views
from packcast.errors import TransferError
from packcast.launch.launchers import ALONE, Launch
from packcast.report import Report
from packcast.settings import Settings
from packcast.view import Joining, View
from tests.cli.conftest import FakeTransfer, snapshot_of, start_of
from tests.helpers.commands import Commands, eventually


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rank_of_three(rank: int) -> Launch:
    return replace(ALONE, kind="torchrun", rank=rank, world_size=3)


def test_everything_that_is_told_is_a_line_with_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonlog, "PROGRESS_EVERY_S", 0.01)
    path = tmp_path / "made" / "log"
    log = JsonLog(str(path), ALONE)
    view: View = Views(log)
    view.phase("join")
    view.joining(Joining(1, 2, (2,), "rank 1 (host-b, pid 7)", 0.0))
    view.warn("no token")
    view.started(start_of(), lambda: snapshot_of(40, workers={1: 40}))
    eventually(lambda: "progress" in path.read_text(), "a line about progress")
    view.close()
    log.ended(TransferError("lost rank 1", hint="look at the cable"))
    log.warn("is too late")
    found = lines_of(path)
    assert all(line["time"] > 1.7e9 for line in found)
    events = [line["event"] for line in found]
    assert events[:4] == ["phase", "join", "warning", "start"]
    assert {*events[4:-1]} == {"progress"}
    assert found[1] | {"time": 0} == {
        "time": 0, "event": "join", "joined": 1, "wanted": 2, "missing": [2],
        "newest": "rank 1 (host-b, pid 7)",
    }  # fmt: skip
    progress = found[4]
    assert (progress["done"], progress["total"]) == (40, 100)
    assert progress["workers"] == {"1": {"done": 40, "stage": "broadcast"}}
    assert found[-1] | {"time": 0} == {
        "time": 0, "event": "end", "ok": False, "exit_code": 5, "error": "lost rank 1",
        "hint": "look at the cable",
    }  # fmt: skip


@pytest.mark.parametrize("sender", [0, 2])
def test_in_a_launch_the_sender_writes_whichever_rank_that_is(tmp_path: Path, sender: int) -> None:
    for rank in range(3):
        log = JsonLog(str(tmp_path / "log"), rank_of_three(rank))
        log.phase("join")
        log.placed(rank, is_sender=rank == sender)
        log.note(f"rank {rank}")
        log.ended(None)
    assert [line.get("text") for line in lines_of(tmp_path / "log")] == [
        None,
        f"rank {sender}",
        None,
    ]


def test_with_a_rank_in_its_name_every_rank_writes(tmp_path: Path) -> None:
    for rank in range(3):
        log = JsonLog(str(tmp_path / "log-{rank}"), rank_of_three(rank))
        log.placed(rank, is_sender=rank == 0)
        log.ended(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log-0", "log-1", "log-2"]


def test_a_run_that_ends_before_anyone_knows_the_sender_is_told_by_rank_0(tmp_path: Path) -> None:
    for rank in (1, 0):
        log = JsonLog(str(tmp_path / "log"), rank_of_three(rank))
        log.phase("join")
        log.ended(TransferError(f"said by rank {rank}"))
    assert lines_of(tmp_path / "log")[-1]["error"] == "said by rank 0"


def test_a_log_that_cannot_be_written_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLog("/dev/full", ALONE)
    log.phase("join")
    log.phase("data")
    log.ended(None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "packcast: warning: --log-json: /dev/full: No space left on device; no more is logged"
    )


def test_the_end_of_a_command_is_the_last_line(transfer: FakeTransfer, tmp_path: Path) -> None:
    def fails(settings: Settings, view: View) -> Report:
        view.phase("join")
        raise TransferError("lost rank 1")

    transfer.does = fails
    log = tmp_path / "log"
    argv = ["recv", "host:1", "--discard", "--log-json", str(log)]
    with pytest.raises(SystemExit):
        run(argv)
    assert [line["event"] for line in lines_of(log)] == ["phase", "phase", "end"]
    assert lines_of(log)[-1]["exit_code"] == 5
    transfer.does = None
    assert run(argv) == 0
    assert lines_of(log)[-1]["ok"] is True


def test_standard_output_is_no_place_for_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recv", "host:1", "--discard", "--log-json", "-"]) == 2
    assert "--log-json" in capsys.readouterr().err


def test_a_whole_transfer_is_told_from_joining_to_its_end(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    end = commands.packcast("send", checkpoint, "--nproc", "2", "--log-json", log).wait()
    assert end.returncode == 0, end.stderr
    phases = [line["phase"] for line in lines_of(log) if line["event"] == "phase"]
    assert phases == ["load", "join", "offer", "start", "data", "finish", "publish", "done"]
    assert [line["joined"] for line in lines_of(log) if line["event"] == "join"] == [0, 1]
    assert lines_of(log)[-1]["event"] == "end"
