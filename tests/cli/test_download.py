"""Claims about models by name: found in the local cache, or told how to get there."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

from packcast.checkpoint.hub import HubModel, cache_folder, hint_for_missing, model_of
from packcast.cli.app import run
from packcast.cli.download import checkpoint_path
from packcast.errors import CheckpointError, UsageError

from .conftest import FakeTransfer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One model as huggingface_hub keeps it: blobs, refs, and a snapshot of symlinks."""
    cache = tmp_path / "hub"
    folder = cache / "models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for path in checkpoint.iterdir():
        shutil.copy(path, folder / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    (folder / "refs" / "pr").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "pr" / "1").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    "name",
    [
        "org/name",
        "org/name@main",
        "org/name@pr/1",
        f"org/name@{COMMIT}",
        "hf://org/name",
        "hf://models/org/name@main",
    ],
)
def test_a_models_name_is_its_snapshot_in_the_cache(
    name: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", name, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoint"]
    assert found["path"] == str(cache / "models--org--name" / "snapshots" / COMMIT)
    assert found["tensors"] == 2


def test_send_takes_a_models_name_too(cache: Path, transfer: FakeTransfer) -> None:
    assert run(["send", "org/name", "--workers", "1", "--listen", "h:1"]) == 0
    assert transfer.settings[0].checkpoint == cache / "models--org--name" / "snapshots" / COMMIT


def test_a_path_that_exists_is_no_models_name(cache: Path, checkpoint: Path) -> None:
    (cache.parent / "org").mkdir()
    shutil.copytree(checkpoint, cache.parent / "org" / "name")
    assert checkpoint_path("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("org/other", "`hf download org/other` brings it there"),
        ("hf://org/other@v2", "`hf download org/other --revision v2` brings it there"),
        ("org/name@v9", f"the cache has org/name@{COMMIT} only"),
    ],
)
def test_a_model_missing_from_the_cache_is_reported_with_the_command_that_gets_it(
    name: str, hint: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", name]) == 3
    error = capsys.readouterr().err
    assert "no such file or directory" in error
    assert hint in error


@pytest.mark.parametrize(
    "text", ["/absolute/name", "a/b/c", "../x", "./x", "org/", "org/.hidden", "a/b@../../c", "name"]
)
def test_what_is_no_models_name_gets_no_such_hint(text: str) -> None:
    found = model_of(text)
    assert found is None or ".." in str(found.revision)
    if found is None:
        assert "hf download" not in hint_for_missing(Path(text), {})


def test_no_name_leads_out_of_the_cache(cache: Path) -> None:
    (cache / "models--org--name" / "refs" / "evil").write_text("../../../..")
    for name in ("org/name@evil", "org/name@a/../../../x"):
        assert checkpoint_path(name) == Path(name)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hubs_own_variables_say(
    environ: Mapping[str, str], folder: str
) -> None:
    assert str(cache_folder(environ)) == folder


def test_a_download_needs_the_library_and_is_made_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="needs huggingface_hub"):
        checkpoint_path("org/other@v1", download=True)
    with pytest.raises(UsageError, match="is not a model's name"):
        checkpoint_path("/org/other", download=True)
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, revision: str | None) -> str:
        asked.append((name, revision))
        if revision == "v2":
            raise OSError("gated\nmany lines")
        return "/there"

    library = types.ModuleType("huggingface_hub")
    vars(library)["snapshot_download"] = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert checkpoint_path("org/other@v1", download=True) == Path("/there")
    with pytest.raises(CheckpointError, match="cannot be downloaded: gated"):
        checkpoint_path("org/other@v2", download=True)
    checkpoint_path("org/name", download=True)
    assert asked == [("org/other", "v1"), ("org/other", "v2")]
    assert HubModel("org/other", "v1").command == "hf download org/other --revision v1"


@pytest.mark.parametrize(
    ("files", "what", "hint"),
    [
        ([], "it is empty", "give the directory"),
        (["a.txt"], "it holds a.txt", "give the directory"),
        (["pytorch_model.bin"], "a PyTorch (pickle) checkpoint", "convert pytorch_model.bin"),
        (["m.gguf"], "a directory of GGUF files", "m.gguf"),
        (["__0_0.distcp", ".metadata"], "a torch.distributed.checkpoint directory", "save it"),
        (["train.parquet"], "a dataset", "safetensors only"),
    ],
)
def test_a_directory_of_something_else_is_called_what_it_is(
    files: list[str], what: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("x")
    assert run(["inspect", str(folder)]) == 3
    error = capsys.readouterr().err
    assert "no .safetensors file in this directory: " in error
    assert what in error
    assert hint in error


def test_a_whole_cache_names_its_models(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(cache)]) == 3
    assert "give one by its name, as in org/name" in capsys.readouterr().err
    home = tmp_path / "home"
    home.mkdir()
    (home / "hub").symlink_to(cache)
    (home / "token").write_text("x")
    assert run(["inspect", str(cache / "models--org--name")]) == 3
    assert f"with the snapshot {COMMIT} (main, pr/1)\n" in capsys.readouterr().err
    shutil.rmtree(cache / "models--org--name" / "refs")
    assert run(["inspect", "org/name"]) == 3
    assert f"the cache has org/name@{COMMIT} only" in capsys.readouterr().err
    assert run(["inspect", f"org/name@{COMMIT}"]) == 0


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        (
            "pytorch_model.bin",
            b"PK\x03\x04\x00\x00\x08\x08" + bytes(60),
            "a PyTorch (pickle) checkpoint",
        ),
        ("old.bin", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a PyTorch (pickle) checkpoint"),
        ("m.gguf", b"GGUF" + bytes(60), "a GGUF file"),
    ],
)
def test_a_file_of_another_format_is_called_what_it_is(
    name: str, data: bytes, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert run(["inspect", str(tmp_path / name)]) == 3
    assert what in capsys.readouterr().err
