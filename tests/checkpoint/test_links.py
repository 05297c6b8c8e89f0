"""Symlinks in a checkpoint: followed within it and to a cache's blobs, elsewhere only if asked."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from packcast.checkpoint import checkpoint as checkpoint_module
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.reading import open_without_links
from packcast.checkpoint.walk import Entry, walk
from packcast.errors import CheckpointError
from tests.checkpoint.handmade import index, names, shard, write

SHARD = "model.safetensors"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return write(tmp_path / "elsewhere" / "secret.txt", "the secret").parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shard(tmp_path / "model" / SHARD, "t").parent


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "target",
    ["{secret}", "../elsewhere/secret.txt", "sub/../../elsewhere/secret.txt", "../model-2/a.txt"],
)
def test_a_linked_file_outside_is_left_out_and_named(
    model: Path, secret: Path, target: str
) -> None:
    (model / "sub").mkdir()
    write(model.with_name("model-2") / "a.txt")  # its name begins like the checkpoint's
    link(model / "notes.txt", target.format(secret=secret / "secret.txt"))
    checkpoint = open_checkpoint(model)
    assert names(checkpoint) == [SHARD]
    assert checkpoint.warnings == (
        "notes.txt: a symlink to outside of the checkpoint: left out (--follow-links follows it)",
    )
    assert names(open_checkpoint(model, follow_links=True)) == [SHARD, "notes.txt"]


def test_a_linked_folder_outside_is_not_even_listed(model: Path, secret: Path) -> None:
    link(model / "more", secret)
    checkpoint = open_checkpoint(model)
    assert names(checkpoint) == [SHARD]
    assert "more: a symlink to outside" in checkpoint.warnings[0]
    assert names(open_checkpoint(model, follow_links=True)) == [SHARD, "more/secret.txt"]


def test_a_chain_of_links_counts_by_its_end(model: Path, secret: Path) -> None:
    link(model / "first.txt", "second")
    link(model / "second", secret / "secret.txt")
    link(secret / "back", model / "own.txt")
    write(model / "own.txt", "mine")
    link(model / "there-and-back.txt", secret / "back")
    assert names(open_checkpoint(model)) == [SHARD, "own.txt", "there-and-back.txt"]


@pytest.mark.parametrize("name", ["second.safetensors", "model.safetensors.index.json"])
def test_a_shard_or_an_index_outside_is_an_error_that_names_the_option(
    model: Path, tmp_path: Path, name: str
) -> None:
    shard(tmp_path / "store" / "second.safetensors", "u")
    index(tmp_path / "store" / "model.safetensors.index.json", {"t": SHARD})
    link(model / name, tmp_path / "store" / name)
    with pytest.raises(CheckpointError, match=f"{name}: a symlink to .*, outside of") as caught:
        open_checkpoint(model)
    assert caught.value.exit_code == 3
    assert "--follow-links" in str(caught.value.hint)
    assert name in names(open_checkpoint(model, follow_links=True))


def test_the_path_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    link(tmp_path / "to-folder", model)
    link(tmp_path / "to-file.safetensors", model / SHARD)
    assert names(open_checkpoint(tmp_path / "to-folder")) == [SHARD]
    assert names(open_checkpoint(tmp_path / "to-file.safetensors")) == ["to-file.safetensors"]


def cache(tmp_path: Path) -> Path:
    """A snapshot as Hugging Face's libraries lay it out."""
    repo = tmp_path / "models--o--n"
    shard(repo / "blobs" / "abc", "t")
    write(repo / "blobs" / "def", "{}")
    snapshot = repo / "snapshots" / "rev"
    link(snapshot / SHARD, "../../blobs/abc")
    link(snapshot / "sub" / "config.json", "../../../blobs/def")
    return snapshot


def test_a_snapshot_links_to_no_other_place_of_the_cache(tmp_path: Path, secret: Path) -> None:
    snapshot = cache(tmp_path)
    write(tmp_path / "models--o--n" / "refs" / "main", "rev")
    link(snapshot / "main.txt", "../../refs/main")
    link(tmp_path / "models--o--n" / "blobs" / "planted", secret / "secret.txt")
    link(snapshot / "planted.txt", "../../blobs/planted")
    assert names(open_checkpoint(snapshot)) == [SHARD, "sub/config.json"]


def test_blobs_that_are_a_link_themselves_are_outside(tmp_path: Path, secret: Path) -> None:
    snapshot = cache(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "moved")
    link(blobs, tmp_path / "moved")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_link_planted_after_the_walk_is_not_followed(
    model: Path, secret: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model / "sub" / "secret.txt", "harmless")

    def planted(*args: object, **more: object) -> tuple[list[Entry], list[str]]:
        found = walk(*args, **more)  # type: ignore[arg-type]
        (model / "sub" / "secret.txt").unlink()
        if where == "file":
            link(model / "sub" / "secret.txt", secret / "secret.txt")
        else:
            (model / "sub").rmdir()
            link(model / "sub", secret)
        return found

    monkeypatch.setattr(checkpoint_module, "walk", planted)
    with pytest.raises(CheckpointError, match=r"sub/secret\.txt: "):
        open_checkpoint(model)


def test_what_is_no_regular_file_is_opened_as_a_name_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("fifo", "socket", "."):
            fd = open_without_links(tmp_path.resolve() / name)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.read(fd, 1)
            os.close(fd)
