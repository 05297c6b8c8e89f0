"""Claims about lines that several processes say on one terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from packcast.cli.outcome import Outcome
from packcast.cli.terminal import say_once
from packcast.errors import PackcastError
from packcast.launch.exit import said_here
from packcast.settings import Settings
from tests.helpers.commands import clean_environment, open_mpi_rank, slurm_task
from tests.helpers.handovers import hand_over


def test_of_many_that_say_the_same_at_once_one_is_heard_and_no_other_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together = threading.Barrier(8)

    def speak(rank: int) -> None:
        together.wait()
        say_once("error: gone\n  look elsewhere", tmp_path / "said")
        say_once(f"error: rank {rank} alone", tmp_path / "said")
        say_once("error: gone", tmp_path / "said")  # without the hint it is another one

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(speak, range(8)))
    said = capsys.readouterr().err
    assert said.count("error: gone\n  look elsewhere\n") == 1
    assert sorted(said.splitlines()) == sorted(
        ["error: gone", "  look elsewhere", "error: gone"]
        + [f"error: rank {rank} alone" for rank in range(8)]
    )


def test_who_cannot_know_what_others_said_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        say_once("error: gone", tmp_path / "removed" / "said")
    assert capsys.readouterr().err == "error: gone\n" * 2


@pytest.mark.parametrize(("verbose", "times"), [(False, 1), (True, 2)])
def test_two_ranks_say_one_error_but_where_each_has_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verbose: bool,
    times: int,
) -> None:
    hand_over(monkeypatch)
    for _ in range(2):
        Outcome(verbose=verbose).failed(PackcastError("gone", hint="look elsewhere"))
    said = capsys.readouterr().err
    assert said.count("packcast: error: gone\n  look elsewhere\n") == times


def test_an_error_and_the_same_one_with_its_rank_are_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for named in ("", "rank 1 (host-a, pid 7): ", "ranks 1-8: "):
        say_once(f"packcast: error: {named}no space", tmp_path / "said")
    assert capsys.readouterr().err == "packcast: error: no space\n"


@pytest.mark.parametrize(("address", "times"), [(None, 1), (("h", 1), 2)])
def test_two_ranks_of_torchrun_say_one_error_but_not_who_was_told_an_address(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: tuple[str, int] | None,
    times: int,
) -> None:
    for rank in range(2):
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        settings = Settings(command="recv", address=address)
        Outcome(settings=settings).failed(PackcastError("gone", hint="look elsewhere"))
    said = capsys.readouterr().err
    assert said.count("packcast: error: gone\n  look elsewhere\n") == times


def test_where_each_rank_has_a_log_of_its_own_each_says_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for log in [*logs, *logs]:
        with log.open("a") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            say_once("error: gone", tmp_path / "said")
    assert [log.read_text() for log in logs] == ["error: gone\n"] * 2


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def run_tasks(tasks: list[dict[str, str]], *argv: str) -> list[str]:
    """What tasks of a launcher say, one after the other, each into a pipe of its own."""
    said = []
    for task in tasks:
        ran = subprocess.run(
            [sys.executable, "-m", "packcast", *argv],
            env=clean_environment() | {"TMPDIR": tempfile.gettempdir()} | task,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert ran.returncode == 2
        said.append(ran.stderr)
    return said


@pytest.mark.parametrize("launcher", ["slurm", "mpirun"])
def test_a_wrong_command_line_is_printed_once_for_all_tasks_of_a_step(
    launcher: str, temporary: Path
) -> None:
    of_rank = slurm_task if launcher == "slurm" else open_mpi_rank
    # The first two tasks of one step, and one of another step, which has an error of its own.
    tasks = [of_rank(step, rank, 3) for step, rank in (("71", 0), ("71", 1), ("72", 1))]
    first, second, other = run_tasks(tasks, "send", "x", "--force")
    assert first.startswith("packcast: error: --force needs --out")
    assert second == ""
    assert other == first
    assert (temporary / f"packcast-{os.geteuid()}").stat().st_mode & 0o077 == 0


def test_an_error_of_an_earlier_try_in_the_same_step_is_printed_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm_task("71", 0, 2).items():
        monkeypatch.setenv(name, value)
    file = said_here()
    assert file is not None
    file.write_text("said")
    assert said_here() == file
    assert file.exists()
    os.utime(file, (1, 1))
    assert said_here() == file
    assert not file.exists()


def test_a_folder_that_others_may_write_is_not_asked_what_was_said(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm_task("71", 0, 2).items():
        monkeypatch.setenv(name, value)
    folder = temporary / f"packcast-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert said_here() is None
