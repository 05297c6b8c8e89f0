"""Claims about lines that several processes say on one terminal."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from packcast.cli.outcome import Outcome
from packcast.cli.terminal import say_once
from packcast.errors import PackcastError
from packcast.settings import Settings
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


def test_an_error_and_the_same_one_with_its_rank_are_said_once(
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
