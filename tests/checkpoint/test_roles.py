"""What indexes say of shards and tensors, and what is said where they do not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.index import whole_file_of
from packcast.errors import UsageError
from tests.checkpoint.handmade import index, names, refused, shard, sharded, write

INDEX = "model.safetensors.index.json"


def roles(checkpoint: Checkpoint) -> dict[str, tuple[set[str], set[str]]]:
    """Of each shard: the tensors that are elsewhere by the index, and those it does not name."""
    return {file.name: (set(file.elsewhere), set(file.unlisted)) for file in checkpoint.shards}


def test_an_old_copy_of_a_tensor_is_told_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    shard(tmp_path / "model-1.safetensors", "a", "b")
    shard(tmp_path / "model-2.safetensors", "b", "c", "d")
    one, two = "model-1.safetensors", "model-2.safetensors"
    index(tmp_path / INDEX, {"a": one, "b": one, "c": two})
    checkpoint = open_checkpoint(tmp_path)
    assert roles(checkpoint) == {one: (set(), set()), two: ({"b"}, {"d"})}
    assert checkpoint.warnings == (
        "model-2.safetensors: 1 of its tensors are not in the index: 'd'",
        "1 tensor is in another shard too, which the index names instead: 'b' in"
        " model-2.safetensors; sent with the files, but not where tensors are received",
    )


def test_all_old_copies_are_counted_once(tmp_path: Path) -> None:
    shard(tmp_path / "model-1.safetensors", *"abcdef")
    shard(tmp_path / "model-2.safetensors", *"bcdefg")
    one, two = "model-1.safetensors", "model-2.safetensors"
    index(tmp_path / INDEX, {**dict.fromkeys("abcdef", one), "g": two})
    [warning] = open_checkpoint(tmp_path).warnings
    assert warning.startswith("5 tensors are in another shard too")
    assert " and 2 more;" in warning


def test_the_variants_of_one_folder_rule_their_own_shards(tmp_path: Path) -> None:
    for variant in ("model", "model.fp16"):
        shard(tmp_path / f"{variant}-1.safetensors", "a", "b")
        shard(tmp_path / f"{variant}-2.safetensors", "b")
        index(
            tmp_path / f"{variant}.safetensors.index.json",
            {"a": f"{variant}-1.safetensors", "b": f"{variant}-2.safetensors"},
        )
    assert roles(open_checkpoint(tmp_path)) == {
        "model-1.safetensors": ({"b"}, set()),
        "model-2.safetensors": (set(), set()),
        "model.fp16-1.safetensors": ({"b"}, set()),
        "model.fp16-2.safetensors": (set(), set()),
    }


def test_the_outermost_index_rules_the_folders_below_it(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard(tmp_path / "original" / "m-1.safetensors", "embed", "other")
    index(tmp_path / "original" / INDEX, {"embed": "m-1.safetensors", "other": "m-1.safetensors"})
    shard(tmp_path / "2_Dense" / "model.safetensors", "linear.weight")
    found = roles(open_checkpoint(tmp_path))
    assert found["original/m-1.safetensors"] == ({"embed"}, {"other"})
    assert found["2_Dense/model.safetensors"] == (set(), {"linear.weight"})


def test_folders_side_by_side_rule_nothing_of_each_other(tmp_path: Path) -> None:
    for folder in ("unet", "text_encoder"):
        shard(tmp_path / folder / "m-1.safetensors", "a")
    index(tmp_path / "unet" / INDEX, {"a": "m-1.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    nothing: tuple[set[str], set[str]] = (set(), set())
    assert roles(checkpoint) == {
        "unet/m-1.safetensors": nothing,
        "text_encoder/m-1.safetensors": nothing,
    }
    assert checkpoint.warnings == ()


def test_with_all_files_the_index_still_rules_the_tensors(tmp_path: Path) -> None:
    shard(sharded(tmp_path) / "consolidated.safetensors", "embed", "tok_embeddings")
    checkpoint = open_checkpoint(tmp_path, all_files=True)
    assert roles(checkpoint)["consolidated.safetensors"] == ({"embed"}, {"tok_embeddings"})


def test_a_tensor_in_another_shard_than_the_index_says_counts_there(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", "x")
    shard(tmp_path / "b.safetensors", "y", "z")
    index(tmp_path / INDEX, {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert roles(checkpoint)["b.safetensors"] == (set(), set())
    [warning] = checkpoint.warnings
    assert warning == f"{INDEX}: 1 tensor is in another shard than it says: 'z'"


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        (INDEX, "model.safetensors"),
        ("unet/m.safetensors.index.fp16.json", "unet/m.fp16.safetensors"),
        ("model.fp16.safetensors.index.json", "model.fp16.safetensors"),
    ],
)
def test_the_whole_file_beside_an_index_has_its_stem(name: str, whole: str) -> None:
    assert whole_file_of(name) == whole


@pytest.mark.parametrize("missing", ["shards", "a shard", "a dangling shard", "a tensor"])
def test_a_whole_file_stands_in_for_shards_that_are_not_there(missing: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard(folder / "model.safetensors", "embed", "layers.0.w", "layers.0.b", "layers.1.w")
    first, second = sorted(folder.glob("model-*"))
    if missing == "a tensor":
        shard(second, "layers.1.w")
    else:
        second.unlink()
    if missing == "a dangling shard":
        second.symlink_to("nowhere")
    if missing == "shards":
        first.unlink()
    checkpoint = open_checkpoint(folder)
    assert names(checkpoint) == ["config.json", "model.safetensors", "tokenizer/vocab.txt"]
    assert roles(checkpoint) == {"model.safetensors": (set(), set())}
    warning, *left = checkpoint.warnings
    assert warning.startswith(f"{INDEX}: ")
    assert "left out, model.safetensors is sent in its place, which lacks 1 of its" in warning
    assert all("left out (--all-files takes it)" in one for one in left)


@pytest.mark.parametrize(
    ("missing", "fault"),
    [
        ("a shard", "1 of 2 shards are not there: model-00002-of-00002.safetensors"),
        ("a tensor", "tensor 'lm_head' is not in model-00002-of-00002.safetensors, where"),
    ],
)
def test_without_a_whole_file_the_error_names_the_option_that_sends_what_is_there(
    missing: str, fault: str, tmp_path: Path
) -> None:
    second = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    if missing == "a tensor":
        shard(second, "layers.1.w")
    else:
        second.unlink()
    error = refused(tmp_path)
    assert error.message.startswith(f"{INDEX}: {fault}")
    assert error.hint == (
        "the download or copy is probably incomplete; --all-files sends what is there"
    )
    checkpoint = open_checkpoint(tmp_path, all_files=True)
    assert {INDEX, "model-00001-of-00002.safetensors"} <= set(names(checkpoint))
    [warning] = checkpoint.warnings
    assert warning.endswith("sent anyway, because of --all-files")


def test_an_index_that_cannot_be_read_travels_with_all_files(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    write(tmp_path / INDEX, "version https://git-lfs.github.com/spec/v1\n")
    hint = refused(tmp_path).hint
    assert hint
    assert "git lfs pull" in hint
    assert "--all-files sends what is there" in hint
    checkpoint = open_checkpoint(tmp_path, all_files=True)
    assert names(checkpoint) == ["model.safetensors", INDEX]
    assert len(checkpoint.warnings) == 1


@pytest.mark.parametrize("written", ["./model.safetensors", "x/../model.safetensors"])
def test_a_shard_that_is_written_with_dots_is_found(written: str, tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    index(tmp_path / INDEX, {"x": written})
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["model.safetensors", INDEX]
    [warning] = checkpoint.warnings
    assert warning == f"{INDEX}: some loaders do not find a shard that is written so: {written!r}"


def test_a_byte_order_mark_before_an_index_is_a_warning(tmp_path: Path) -> None:
    content = (sharded(tmp_path) / INDEX).read_bytes()
    write(tmp_path / INDEX, b"\xef\xbb\xbf" + content)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_tensors == 5
    [warning] = checkpoint.warnings
    assert warning == f"{INDEX}: begins with a byte order mark, which some loaders do not read"


def cache(root: Path, *revisions: str) -> Path:
    """A model's folder in the cache of Hugging Face."""
    folder = root / "models--org--name"
    (folder / "blobs").mkdir(parents=True)
    for revision in revisions:
        sharded(folder / "snapshots" / revision)
    return folder


@pytest.mark.parametrize("given", ["", "snapshots"])
def test_a_cache_folder_is_refused_with_its_snapshots(given: str, tmp_path: Path) -> None:
    folder = cache(tmp_path, "abc", "def") / given
    error = refused(folder)
    told = "a model's folder in a Hugging Face cache, with the snapshots abc, def"
    assert error.message == f"{folder}: {told}, and no refs that give them names"
    snapshots = tmp_path / "models--org--name" / "snapshots"
    assert error.hint == f"give one of them: {snapshots / 'abc'}, {snapshots / 'def'}"
    assert len(open_checkpoint(snapshots / "abc").files) == 5
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("def\n")
    assert refused(folder).message == f"{folder}: {told} (main)"
    (snapshots.parent / "blobs").rmdir()  # as in a copy that followed the links
    assert refused(folder).hint == error.hint


def test_a_cache_folder_without_a_snapshot_is_told_how_to_get_one(tmp_path: Path) -> None:
    folder = cache(tmp_path)
    (folder / "snapshots").mkdir()
    error = refused(folder)
    assert error.message.endswith("with no snapshot in it")
    assert error.hint == "`hf download org/name` makes one"


def test_the_current_directory_is_known_as_a_cache_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache(tmp_path, "abc") / "snapshots")
    assert refused(Path()).hint == "give one of them: abc"


def test_a_whole_cache_is_refused(tmp_path: Path) -> None:
    cache(tmp_path, "abc")
    assert "holds several models" in refused(tmp_path).message


def test_files_are_left_out_by_glob(tmp_path: Path) -> None:
    sharded(tmp_path)
    os.symlink("nowhere", tmp_path / "dangling.json")
    shard(tmp_path / "original" / "deep" / "m.safetensors", "w")
    write(tmp_path / "original" / "config.json")
    write(tmp_path / "notes" / "a.txt")
    for glob in ("original", "original/", "./original/*", "orig*"):
        checkpoint = open_checkpoint(tmp_path, exclude_files=(glob, "dangling*", "notes/*.txt"))
        assert names(checkpoint) == [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            INDEX,
            "tokenizer/vocab.txt",
        ], glob
        assert checkpoint.warnings == ()
    hint = refused(tmp_path).hint
    assert hint
    assert "--exclude-files" in hint


def test_a_glob_that_matches_no_file_is_a_warning(tmp_path: Path) -> None:
    assert open_checkpoint(sharded(tmp_path), exclude_files=("orignal/*",)).warnings == (
        "--exclude-files orignal/*: matches no file",
    )


def test_leaving_out_all_or_what_the_index_names_is_refused(tmp_path: Path) -> None:
    error = refused(sharded(tmp_path), exclude_files=["*-00002-*"])
    assert isinstance(error, UsageError)
    assert "leaves out model-00002-of-00002.safetensors, which" in error.message
    kept = open_checkpoint(tmp_path, exclude_files=("*-00002-*", "*.index.json"))
    assert [file.name for file in kept.shards] == ["model-00001-of-00002.safetensors"]
    assert isinstance(refused(tmp_path, exclude_files=["*"]), UsageError)
    assert isinstance(
        refused(tmp_path / "model-00001-of-00002.safetensors", exclude_files=["*"]), UsageError
    )


@pytest.mark.parametrize("how", ["the size", "the names"])
def test_a_folder_that_holds_the_same_weights_again_is_named(how: str, tmp_path: Path) -> None:
    shard(tmp_path / "model-00001-of-00001.safetensors", "model.a", "model.b", num_elements=1000)
    index(
        tmp_path / INDEX, dict.fromkeys(("model.a", "model.b"), "model-00001-of-00001.safetensors")
    )
    if how == "the size":
        shard(tmp_path / "original" / "model.safetensors", "block.ab", num_elements=1900)
        nbytes = "7,600"
    else:
        shard(tmp_path / "original" / "model.safetensors", "model.a", num_elements=10)
        nbytes = "40"
    shard(tmp_path / "2_Dense" / "model.safetensors", "linear.weight", num_elements=10)
    assert open_checkpoint(tmp_path).warnings[-1] == (
        f"original/ seems to hold the same weights again, 1 file of {nbytes} bytes:"
        " --exclude-files 'original/*' leaves it out"
    )
    checkpoint = open_checkpoint(tmp_path, exclude_files=("original/*",))
    assert checkpoint.warnings == ()
    assert checkpoint.num_tensors == 3
