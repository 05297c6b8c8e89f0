"""Claims about `packcast verify`, --manifest and --report as they are typed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from packcast.cli.afterwards import Afterwards
from packcast.cli.app import run
from packcast.comparison import ComparedFile, Comparison
from packcast.errors import UsageError
from packcast.launch.launchers import Launch
from packcast.report import Report
from packcast.settings import Settings

from .conftest import FakeTransfer


@pytest.fixture
def copies(checkpoint: Path, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(checkpoint, tmp_path / f"copy-{i}")) for i in (1, 2)]


def test_copies_are_compared_with_the_first(
    checkpoint: Path, copies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(checkpoint), *map(str, copies)]) == 0
    out = capsys.readouterr().out
    assert f"{copies[0]}: identical to {checkpoint}, 2 files" in out
    assert f"{copies[1]}: identical to {checkpoint}, 2 files" in out


def test_all_that_differs_is_listed_and_the_exit_code_is_six(
    checkpoint: Path, copies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copies[1] / "config.json").unlink()
    (copies[1] / "more.txt").write_text("x")
    data = bytearray((copies[1] / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copies[1] / "model.safetensors").write_bytes(data)
    report = tmp_path / "report.txt"
    argv = ["verify", str(checkpoint), *map(str, copies), "--report", str(report)]
    assert run([*argv, "--json", str(tmp_path / "v.json")]) == 6
    captured = capsys.readouterr()
    assert captured.err.endswith(f"packcast: error: 1 of 2 copies differs: {copies[1]}\n")
    for line in ("missing    config.json", "extra      more.txt", "1 of 2 tensors: b\\x1b[31m"):
        assert line in captured.out
    document = json.loads((tmp_path / "v.json").read_text())
    assert (document["ok"], document["exit_code"]) == (False, 6)
    wrong = document["copies"][1]
    assert (wrong["missing"], wrong["extra"]) == (["config.json"], ["more.txt"])
    assert wrong["differing"][0]["tensors"] == ["b\x1b[31m"]
    lines = report.read_text().splitlines()
    assert lines[0] == f"# {copies[0]} against {checkpoint}"
    assert "=\tmodel.safetensors\ta" in lines
    assert "*\tmodel.safetensors\tb\\x1b[31m" in lines
    assert "-\tconfig.json" in lines
    assert "+\tmore.txt" in lines


def test_one_copy_is_compared_with_the_manifest_beside_it(
    copies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copies[0]
    assert run(["verify", str(copy)]) == 2
    assert f"there is no {copy}.xxh128" in capsys.readouterr().err
    for kind, suffix in (("sha256", "sha256"), ("xxh128", "xxh128")):
        assert run(["verify", str(copy), "--manifest", f"{copy}.{suffix}", "--digest", kind]) == 0
    assert run(["verify", str(copy)]) == 0
    (copy / "config.json").write_text("[]")
    assert run(["verify", str(copy), "--against", f"{copy}.sha256"]) == 6
    assert "config.json: has another hash" in capsys.readouterr().out


def test_verify_needs_no_torch(checkpoint: Path, copies: list[Path]) -> None:
    code = (
        "import sys; from packcast.cli.app import run; "
        f"assert run(['verify', {str(checkpoint)!r}, {str(copies[0])!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_manifest_goes_with_a_copy_and_beside_it(
    checkpoint: Path, transfer: FakeTransfer, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["recv", "h:1"]
    assert run([*base, "--discard", "--manifest", "m"]) == 2
    assert "--manifest needs --out" in capsys.readouterr().err
    assert run([*base, "--out", "d/{rank}", "--manifest", "d/{rank}/m"]) == 2
    assert "is inside the copy" in capsys.readouterr().err
    assert run([*base, "--out", "d/{rank}", "--manifest", "d/{rank}.xxh128"]) == 0


def test_ranks_of_one_host_do_not_write_one_report() -> None:
    settings = Settings(command="send", sink="verify", target="x")
    with pytest.raises(UsageError, match="would write the same file"):
        Afterwards(report="r").check(settings, 2)
    Afterwards(report="r-{local_rank}").check(settings, 2)
    Afterwards(report="r").check(settings, 1)
    with pytest.raises(UsageError, match="--report needs --verify"):
        Afterwards(report="r").check(Settings(command="send"), 1)


def test_a_rank_writes_what_it_has_compared_and_hashes_what_it_has_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    launch = Launch("none", rank=0, world_size=1, local_rank=0, local_world_size=1)
    compared = Comparison("/copy", "it", (ComparedFile("config.json", "="),))
    report = Report(command="recv", rank=3, comparison=compared, workers={3: {}})
    Afterwards(report=f"{tmp_path}/r-{{rank}}").write(report, launch)
    assert (tmp_path / "r-3").read_text() == "# /copy against it\n=\tconfig.json\n"
    facts = {"sink": "write", "target": str(checkpoint), "wrote": True}
    report = Report(command="recv", rank=3, workers={3: facts}, digests={"config.json": ""})
    wanted = Afterwards(manifest=f"{tmp_path}/m-{{rank}}")
    with pytest.raises(Exception, match="has changed since"):
        wanted.write(report, launch)
    digest = "9bbf1ae2b4ae2d5b5cb0b5ccc9d0c1c9"
    report = Report(
        command="recv",
        rank=3,
        workers={3: {**facts, "wrote": False}},
        digests={"config.json": digest},
    )
    assert wanted.write(report, launch) is report
    assert not (tmp_path / "m-3").exists()
