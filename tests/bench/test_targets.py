"""Claims about files that results are exported to."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from packcast.bench.results import Results
from packcast.bench.targets import export_targets, replace_file, write_targets
from packcast.errors import DestinationError, UsageError

RESULTS = Results(command_line="packcast bench")


def test_bad_targets_are_refused_before_anything_runs(tmp_path: Path) -> None:
    for text, said in (
        (str(tmp_path), "is a directory"),
        (str(tmp_path / "no" / "r.json"), "does not exist"),
        ("", "is empty"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            export_targets({"--export-json": text})
        assert caught.value.message.startswith("--export-json: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="may not be written"):
        export_targets({"--export-csv": str(tmp_path / "r.csv")})


def test_two_exports_never_share_a_place(tmp_path: Path) -> None:
    for text in ("-", str(tmp_path / "r")):
        with pytest.raises(UsageError, match="--export-json and --export-csv would both write"):
            export_targets({"--export-json": text, "--export-csv": text})


def test_what_is_not_asked_for_is_no_target(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    (target,) = export_targets({"--export-json": None, "--export-csv": str(path)})
    assert (target.option, target.path) == ("--export-csv", path)
    assert not path.exists()


def test_files_are_rewritten_each_time_and_standard_output_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    targets = export_targets({"--export-json": str(path), "--export-markdown": "-"})
    write_targets(targets, RESULTS)
    assert json.loads(path.read_text())["exit_code"] is None
    assert capsys.readouterr().out == ""
    write_targets(targets, replace(RESULTS, exit_code=0))
    assert json.loads(path.read_text())["exit_code"] == 0
    assert capsys.readouterr().out.startswith("```\npackcast bench")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "r", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    replace_file(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_that_any_program_gives(tmp_path: Path) -> None:
    replace_file(tmp_path / "ours", b"x")
    (tmp_path / "usual").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_device_is_written_not_replaced() -> None:
    replace_file(Path("/dev/null"), b"x")
    assert not Path("/dev/null").is_file()


def test_a_target_that_cannot_be_written_keeps_none_of_the_others_from_it(tmp_path: Path) -> None:
    gone, there = tmp_path / "gone", tmp_path / "r.csv"
    gone.mkdir()
    targets = export_targets({"--export-json": str(gone / "r"), "--export-csv": str(there)})
    gone.rmdir()
    with pytest.raises(DestinationError, match="--export-json"):
        write_targets(targets, RESULTS)
    assert there.exists()
