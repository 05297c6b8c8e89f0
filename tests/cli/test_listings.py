"""Claims about `inspect` and `--dry-run`, on a real small checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packcast.cli.app import run
from packcast.cli.tables import table

Capture = pytest.CaptureFixture[str]
NBYTES_OF_DATA = 26


def test_inspect_lists_files_and_totals(checkpoint: Path, capsys: Capture) -> None:
    assert run(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "config.json        sidecar" in out
    assert "1 F32, 1 BF16" in out
    assert "2 files, 2 tensors" in out
    assert "offset" not in out


def test_inspect_lists_tensors_and_trusts_no_name(checkpoint: Path, capsys: Capture) -> None:
    assert run(["inspect", str(checkpoint), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "2x3" in out
    assert "scalar" in out
    assert "b\\x1b[31m" in out
    assert "\x1b" not in out


def test_inspect_as_json_is_all_that_is_on_standard_output(
    checkpoint: Path, capsys: Capture
) -> None:
    assert run(["inspect", str(checkpoint), "--tensors", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["command"], found["ok"]) == (1, "inspect", True)
    assert [file["kind"] for file in found["files"]] == ["sidecar", "shard"]
    shard = found["files"][1]
    assert shard["dtypes"] == {"F32": 1, "BF16": 1}
    first, second = found["tensors"]
    assert (first["name"], first["shape"], first["bytes"]) == ("a", [2, 3], 24)
    assert second["offset"] + second["bytes"] == shard["bytes"]


def test_files_left_out_by_glob_are_in_neither_listing(checkpoint: Path, capsys: Capture) -> None:
    for command in (["inspect"], ["send", "--dry-run"]):
        assert run([*command, str(checkpoint), "--exclude-files", "*.json", "--json", "-"]) == 0
        assert [file["kind"] for file in json.loads(capsys.readouterr().out)["files"]] == ["shard"]


def test_a_file_for_the_json_leaves_the_table(
    checkpoint: Path, capsys: Capture, tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    assert run(["inspect", str(checkpoint), "--json", str(file)]) == 0
    assert "2 tensors" in capsys.readouterr().out
    assert json.loads(file.read_text())["checkpoint"]["tensors"] == 2


def test_no_checkpoint_is_exit_3_also_in_the_json(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "r.json"
    assert run(["inspect", str(tmp_path / "none"), "--json", str(file)]) == 3
    assert capsys.readouterr().err.startswith("packcast: error: ")
    assert json.loads(file.read_text())["exit_code"] == 3


def test_a_dry_run_needs_nobody_and_states_the_memory(checkpoint: Path, capsys: Capture) -> None:
    argv = ["send", str(checkpoint), "--dry-run", "--buffer-size", "2MiB", "--num-buffers", "3"]
    assert run([*argv, "--staging", "8MiB"]) == 0
    out = capsys.readouterr().out
    assert f"{3 * ((2 << 20) + 4096):,} bytes on each rank: 3 buffers of 2MiB + 4096" in out
    assert (
        f"{3 * ((2 << 20) + 4096):,} bytes on each rank with a GPU that reads or writes files"
        in out
    )  # of 8 MiB
    assert "1 of at most 2MiB" in out


def test_a_dry_run_of_a_selection_counts_what_would_go(checkpoint: Path, capsys: Capture) -> None:
    assert run(["send", str(checkpoint), "--dry-run", "--include", "a", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] is True
    assert found["checkpoint"]["tensors"] == 1
    assert found["checkpoint"]["bytes"] == sum(file["bytes"] for file in found["files"])
    assert found["chunks"] == 1
    assert found["buffers"] == {"size": 16 << 20, "count": 4, "staging": 192 << 20}


def test_a_dry_run_of_nothing_is_the_error_that_send_would_give(
    checkpoint: Path, capsys: Capture
) -> None:
    assert run(["send", str(checkpoint), "--dry-run", "--include", "zzz"]) == 2
    assert capsys.readouterr().out == ""


def test_cells_stay_on_their_line_and_in_their_column() -> None:
    text = table(("name", ">bytes"), [("a\nb", "1"), ("c", "1,000")])
    assert text == "name  bytes\na\\nb      1\nc     1,000"
