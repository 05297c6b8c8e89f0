"""Claims about `clean`, and about --in-place on the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from packcast.cli import clean as cleaning
from packcast.cli import start
from packcast.cli.app import run
from packcast.cli.outcome import Outcome
from packcast.io.sinks.record import claim
from packcast.settings import Settings

from .conftest import FakeTransfer

Capture = pytest.CaptureFixture[str]


def partial(folder: Path, name: str, *, lives: bool) -> int:
    """A partial directory of 1 MiB; a lock that is let go is what the end of its process leaves."""
    (folder / name).mkdir(parents=True)
    (folder / name / "a.bin").write_bytes(bytes(1 << 20))
    fd = os.open(folder / name, os.O_RDONLY)
    try:
        claimed = claim(fd)
    finally:
        os.close(fd)
    if not lives:
        os.close(claimed)
    return claimed


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Path]:
    """A folder with an unused partial copy, one in use, and one without a record."""
    folder = tmp_path / "local"
    partial(folder, ".one.packcast-1", lives=False)
    claimed = partial(folder, ".two.packcast-2", lives=True)
    (folder / ".three.packcast-3").mkdir()
    yield folder
    os.close(claimed)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_clean_lists_partial_copies_and_removes_nothing(local: Path, capsys: Capture) -> None:
    before = names(local)
    assert run(["clean", str(local)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "unused" in lines[1]
    assert ".one.packcast-1" in lines[1]
    assert f"pid {os.getpid()} on " in lines[1]
    assert "unknown" in lines[2]
    assert "used  " in lines[3]
    assert lines[5] == "1 unused, 1.0 MiB: remove with --yes"
    assert names(local) == before


def test_clean_with_yes_removes_unused_partial_copies(local: Path, capsys: Capture) -> None:
    assert run(["clean", str(local), "--yes"]) == 0
    assert "1 partial copy removed" in capsys.readouterr().out
    assert names(local) == [".three.packcast-3", ".two.packcast-2"]
    assert run(["clean", str(local), "--yes"]) == 0
    assert "0 partial copies removed" in capsys.readouterr().out


def test_clean_takes_the_target_as_well_as_what_holds_it(local: Path, capsys: Capture) -> None:
    (local / "one").mkdir()
    assert run(["clean", str(local / "one"), "--yes"]) == 0
    assert ".one.packcast-1" not in names(local)


def test_clean_as_json(local: Path, capsys: Capture) -> None:
    assert run(["clean", str(local), "--yes", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["ok"], found["exit_code"]) == ("clean", True, 0)
    one, three, two = found["partials"]
    assert (one["state"], one["removed"]) == ("unused", True)
    assert (three["state"], three["owner"], three["removed"]) == ("unknown", None, False)
    assert (two["state"], two["removed"]) == ("used", False)


def test_clean_finds_nothing_where_there_is_nothing(tmp_path: Path, capsys: Capture) -> None:
    assert run(["clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no partial copies in {tmp_path}\n"
    assert run(["clean", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_what_cannot_be_removed_is_exit_7(
    local: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "remove_if_unused", lambda _partial: False)
    assert run(["clean", str(local), "--yes"]) == 7
    assert "could not be removed: " in capsys.readouterr().err


@pytest.mark.parametrize("remove", [True, False])
def test_after_a_failure_the_launcher_looks_after_its_ranks_targets(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, remove: bool
) -> None:
    monkeypatch.setattr(
        start, "run_nproc", lambda *_args, look_after, **_kwargs: look_after(remove) or 5
    )
    partial(tmp_path, ".w1.packcast-1", lives=False)
    partial(tmp_path, ".w3.packcast-1", lives=False)  # another run's: there are ranks 0, 1 and 2
    settings = Settings(
        command="send", checkpoint=tmp_path, sink="write", target=str(tmp_path / "w{rank}")
    )
    assert start.start_ranks(Outcome(settings=settings), 3) == 5
    said = capsys.readouterr().err
    assert said.count("was left behind by") == 1
    assert said.endswith(": removed\n") or f"`packcast clean --yes {tmp_path}`" in said
    left = [".w3.packcast-1"] if remove else [".w1.packcast-1", ".w3.packcast-1"]
    assert names(tmp_path) == left


def test_in_place_reaches_the_transfer_and_goes_with_out_only(
    transfer: FakeTransfer, checkpoint: Path, capsys: Capture
) -> None:
    assert run(["recv", "h:1", "--out", "d", "--in-place"]) == 0
    assert run(["recv", "h:1", "--out", "d"]) == 0
    assert [settings.in_place for settings in transfer.settings] == [True, False]
    assert run(["recv", "h:1", "--discard", "--in-place"]) == 2
    assert "--in-place needs --out" in capsys.readouterr().err
