"""Claims about `inspect` and `--dry-run`, on a real small checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from packcast.cli.app import run
from packcast.cli.tables import table
from packcast.io.memory import MemoryLimit

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


def test_inspect_sums_up_dtypes_and_names_the_largest_tensor(
    checkpoint: Path, capsys: Capture
) -> None:
    assert run(["inspect", str(checkpoint), "--json", str(checkpoint.parent / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "F32   1 tensor  24 B\nBF16  1 tensor   2 B" in out
    assert "largest tensor: a, F32 2x3, 24 B, in model.safetensors" in out
    found = json.loads((checkpoint.parent / "r.json").read_text())["checkpoint"]
    assert found["dtypes"]["F32"] == {"tensors": 1, "bytes": 24}
    assert found["largest_tensor"]["name"] == "a"


@pytest.mark.parametrize("command", [["inspect"], ["send", "--dry-run"]], ids=str)
def test_what_is_not_sent_is_listed_with_the_reason(
    command: list[str], checkpoint: Path, capsys: Capture
) -> None:
    (checkpoint / ".gitattributes").write_text("")
    (checkpoint / ".git").mkdir()
    (checkpoint / "empty").mkdir()
    (checkpoint / "pytorch_model.bin").write_text("")
    (checkpoint / "deep" / "er").mkdir(parents=True)
    (checkpoint / "deep" / "er" / "x.json").write_text("{}")
    (checkpoint / "deep" / "ok.json").write_text("{}")
    argv = [*command, str(checkpoint), "--exclude-files", "deep/er/*"]
    assert run([*argv, "--json", str(checkpoint.parent / "r.json")]) == 0
    assert "not sent:\n  hidden: .git/, .gitattributes\n" in capsys.readouterr().out
    found = json.loads((checkpoint.parent / "r.json").read_text())
    assert {it["name"]: it["reason"] for it in found["left_out"]} == {
        ".git/": "hidden",
        ".gitattributes": "hidden",
        "empty/": "an empty folder",
        "pytorch_model.bin": "weights in another format",
        "deep/er/x.json": "--exclude-files",
    }
    assert "deep/ok.json" in [file["name"] for file in found["files"]]


def test_without_sidecars_they_are_what_is_not_sent(checkpoint: Path, capsys: Capture) -> None:
    assert run(["send", str(checkpoint), "--dry-run", "--no-sidecars"]) == 0
    assert "not sent:\n  --no-sidecars: config.json" in capsys.readouterr().out


def test_a_dry_run_needs_no_other_rank_and_states_the_memory(
    checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["send", str(checkpoint), "--dry-run", "--buffer-size", "2MiB", "--num-buffers", "3"]
    monkeypatch.setattr("packcast.cli.dryrun.has_gpu_driver", lambda: True)
    assert run([*argv, "--staging", "8MiB", "--json", str(checkpoint.parent / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "GPU memory     6.0 MiB on each rank, sender and workers alike: 3 buffers of 2MiB" in out
    assert "pinned memory  6.0 MiB on each rank that reads or writes files" in out
    assert "1 of at most 2MiB" in out
    found = json.loads((checkpoint.parent / "r.json").read_text())
    assert found["device_bytes"] == found["pinned_bytes"] == 3 * ((2 << 20) + 4096)


def test_a_dry_run_chooses_and_refuses_buffers_as_a_transfer_does(
    checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = MemoryLimit(key="box", free=200 << 20, name="the limit of the box")
    monkeypatch.setattr("packcast.cli.dryrun.memory_limits", lambda: (limit,))
    argv = ["send", str(checkpoint), "--dry-run", "--device", "cpu", "--nproc", "2"]
    assert run([*argv, "--json", str(checkpoint.parent / "r.json")]) == 0
    said = capsys.readouterr()
    assert "32.0 MiB on each rank, sender and workers alike: 2 buffers of 16MiB" in said.out
    assert "available    200 MiB, which the limit of the box leaves" in said.out
    assert "low on memory: 2 buffers of 16MiB instead of 4 buffers of 16MiB" in said.err
    found = json.loads((checkpoint.parent / "r.json").read_text())
    assert found["memory"] == [{"limit": "the limit of the box", "free_bytes": 200 << 20}]
    assert found["buffers"]["count"] == 2
    assert run([*argv, "--buffer-size", "64MiB"]) == 5
    assert "need 512 MiB for 4 buffers of 64MiB" in capsys.readouterr().err


def test_a_dry_run_says_that_modes_are_kept_and_what_is_private(
    checkpoint: Path, capsys: Capture
) -> None:
    for path in checkpoint.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (checkpoint / "config.json").chmod(0o600)
    checkpoint.chmod(0o750)
    assert run(["send", str(checkpoint), "--dry-run"]) == 0
    (line,) = [it for it in capsys.readouterr().out.splitlines() if it.startswith("modes")]
    assert "1 file 600 (private)" in line
    assert line.endswith("; folders 750")


@pytest.mark.parametrize("more", [[], ["--device", "cpu"], ["--backend", "gloo"]], ids=str)
def test_on_a_cpu_no_gpu_memory_is_spoken_of(
    more: list[str], checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packcast.cli.dryrun.has_gpu_driver", lambda: bool(more))
    assert run(["send", str(checkpoint), "--dry-run", *more]) == 0
    out = capsys.readouterr().out
    assert "host memory  64.0 MiB on each rank" in out
    assert "GPU" not in out
    assert "pinned" not in out


def test_a_dry_run_counts_the_copies_of_all_ranks_and_compares_the_room(
    checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["send", str(checkpoint), "--dry-run", "--nproc", "4"]
    assert run([*argv, "--out", f"{tmp_path}/copy-{{rank}}"]) == 0
    out = capsys.readouterr().out
    assert "for 3 copies, " in out
    assert f" free at {tmp_path}" in out
    assert not list(tmp_path.glob("copy*"))
    assert run([*argv, "--out", f"{tmp_path}/one", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["space"][0]["copies"] == 1
    (tmp_path / "copy-2").mkdir()
    (tmp_path / "copy-2" / "mine").write_text("")
    assert run([*argv, "--out", f"{tmp_path}/copy-{{rank}}"]) == 7
    assert "copy-2 exists and is not empty" in capsys.readouterr().err
    full = os.statvfs_result((4096, 4096, 9, 0, 0, 9, 9, 9, 0, 255))
    monkeypatch.setattr("packcast.cli.dryrun.os.statvfs", lambda path: full)
    assert run([*argv, "--out", f"{tmp_path}/other-{{rank}}"]) == 7
    assert "3 copies need 522 B, and 0 B are free" in capsys.readouterr().err


def test_many_thousand_tensors_are_summed_up_in_few_lines(tmp_path: Path, capsys: Capture) -> None:
    tensors = {
        f"layers.{i}.w": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i in range(20_000)
    }
    header = json.dumps(tensors).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(20_000)
    (tmp_path / "m.safetensors").write_bytes(data)
    for command in (["inspect"], ["send", "--dry-run"]):
        assert run([*command, str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "20,000 tensors" in out
        assert len(out.splitlines()) < 20


def test_a_dry_run_of_a_selection_counts_what_would_go(checkpoint: Path, capsys: Capture) -> None:
    assert run(["send", str(checkpoint), "--dry-run", "--include", "a", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] is True
    assert found["checkpoint"]["tensors"] == 1
    assert found["checkpoint"]["bytes"] == sum(file["bytes"] for file in found["files"])
    assert found["chunks"] == 1
    assert found["buffers"] == {"size": 16 << 20, "count": 4, "staging": 100 << 20}


def test_cells_stay_on_their_line_and_in_their_column() -> None:
    text = table(("name", ">bytes"), [("a\nb", "1"), ("c", "1,000")])
    assert text == "name  bytes\na\\nb      1\nc     1,000"
