"""What a whole transfer keeps of its source's files, and what a selection is compared with."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_tree
from tests.helpers.commands import Commands

FIRST = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(("mask", "others"), [("022", 0o055), ("077", 0)])
def test_a_private_file_stays_private_and_a_program_a_program(
    commands: Commands, checkpoint: Path, tmp_path: Path, mask: str, others: int
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    modes = {"": 0o755, "1_Pooling": 0o700, FIRST: 0o600, "config.json": 0o755}
    for name, mode in modes.items():
        (source / name).chmod(mode)
    out = tmp_path / "out"
    masked = f"import os; os.umask(0o{mask})"
    result = commands.packcast("send", source, "--nproc", "2", "--out", out, before=masked).wait()
    assert result.returncode == 0, result.stderr
    same_tree(source, out)
    found = {name: stat.S_IMODE((out / name).stat().st_mode) for name in modes}
    assert found == {name: mode & (0o700 | others) for name, mode in modes.items()}


def test_a_worker_compares_a_selection_with_the_same_tensors_of_a_full_copy(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    full = Path(shutil.copytree(checkpoint, tmp_path / "full"))
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    with (damaged / FIRST).open("r+b") as file:  # in layer.1.0, behind the header
        file.seek(200_000)
        byte = file.read(1)
        file.seek(200_000)
        file.write(bytes([byte[0] ^ 1]))
    sender, *workers = commands.run_ranks(
        ("send", checkpoint, "--include", "layer.*.0"),
        ("recv", "--verify", full),
        ("recv", "--verify", damaged),
        ("recv", "--out", tmp_path / "chosen"),
    )
    assert [end.returncode for end in (sender, *workers)] == [6, 0, 6, 0], sender.stderr
    assert "(tensor layer.1.0, its byte" in workers[1].sentence
    assert "1 of 3 tensors differs" in workers[1].sentence
    shortened = json.loads((tmp_path / "chosen" / INDEX).read_text())["weight_map"]
    assert shortened.keys() == {"layer.1.0", "layer.2.0", "layer.3.0"}
    assert f"{INDEX}: not compared, since that of a selection is shorter" in workers[0].stderr


def test_a_copy_of_a_selection_is_compared_as_one(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    chosen = ("send", checkpoint, "--include", "layer.[12].*")
    for sink in ("--out", "--verify"):
        ends = commands.run_ranks(chosen, ("recv", sink, tmp_path / "chosen"))
        assert [end.returncode for end in ends] == [0, 0], ends[0].stderr
