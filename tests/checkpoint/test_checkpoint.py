from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules

import pytest

import packcast.checkpoint
from packcast.checkpoint import names as names_module
from packcast.checkpoint import sourcefile as sourcefile_module
from packcast.checkpoint import walk as walk_module
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.header import Header
from packcast.checkpoint.header_limits import HeaderLimits
from packcast.checkpoint.reading import FileState
from packcast.checkpoint.sourcefile import MAX_MTIME_NS
from tests.checkpoint.handmade import index, names, refused, shard, sharded, write


def test_a_single_file_is_itself_alone(tmp_path: Path) -> None:
    path = shard(tmp_path / "model.safetensors", "a", "b")
    write(tmp_path / "config.json", "{}")
    path.chmod(0o755)
    checkpoint = open_checkpoint(path)
    [file] = checkpoint.files
    found = path.stat()
    assert (checkpoint.path, checkpoint.warnings) == (path, ())
    assert (file.name, file.path) == ("model.safetensors", path.resolve())
    assert file.state == FileState.of(found)
    assert (file.nbytes, file.mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert (file.mode, file.folder_mode) == (0o755, tmp_path.stat().st_mode & 0o777)
    assert file.header
    assert (checkpoint.num_tensors, checkpoint.nbytes) == (2, found.st_size)
    assert checkpoint.shards == checkpoint.files


def test_a_sharded_directory_has_its_shards_index_and_sidecars(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert names(checkpoint) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer/vocab.txt",
    ]
    assert checkpoint.warnings == ()
    assert [file.name for file in checkpoint.shards] == names(checkpoint)[1:3]
    assert checkpoint.num_tensors == 5


def test_without_sidecars_the_index_still_belongs(tmp_path: Path) -> None:
    os.symlink("nowhere", sharded(tmp_path) / "dangling.json")
    checkpoint = open_checkpoint(tmp_path, sidecars=False)
    assert names(checkpoint) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert checkpoint.warnings == ()


def test_loose_shards_and_nested_folders_belong(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", "x")
    shard(tmp_path / "b.safetensors", "x")
    shard(tmp_path / "2_Dense" / "model.safetensors", "linear.weight")
    assert len(open_checkpoint(tmp_path).shards) == 3


def test_each_index_rules_the_shards_of_its_own_folder(tmp_path: Path) -> None:
    write(tmp_path / "model_index.json", "{}")
    for folder in ("unet", "text_encoder"):
        stem = "diffusion_pytorch_model" if folder == "unet" else "model"
        shard(tmp_path / folder / f"{stem}-1.safetensors", "a")
        shard(tmp_path / folder / f"{stem}.safetensors", "a")
        index(tmp_path / folder / f"{stem}.safetensors.index.json", {"a": f"{stem}-1.safetensors"})
    shard(tmp_path / "vae" / "model.safetensors", "a")
    shard(tmp_path / "flux.safetensors", "b", num_elements=400)
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.shards] == [
        "flux.safetensors",
        "text_encoder/model-1.safetensors",
        "unet/diffusion_pytorch_model-1.safetensors",
        "vae/model.safetensors",
    ]
    assert len(checkpoint.warnings) == 2
    assert "model_index.json" in names(checkpoint)


def test_two_indexes_in_one_folder_rule_together(tmp_path: Path) -> None:
    for variant in ("model", "model.fp16"):
        shard(tmp_path / f"{variant}-1.safetensors", "a")
        index(tmp_path / f"{variant}.safetensors.index.json", {"a": f"{variant}-1.safetensors"})
    shard(tmp_path / "model.bf16-1.safetensors", "a")
    index(tmp_path / "model.safetensors.index.bf16.json", {"a": "model.bf16-1.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert (len(checkpoint.shards), checkpoint.warnings) == (3, ())


def test_a_consolidated_file_beside_an_index_is_left_with_a_warning(tmp_path: Path) -> None:
    write(sharded(tmp_path) / "consolidated.safetensors", "not even a safetensors file")
    checkpoint = open_checkpoint(tmp_path)
    assert "consolidated.safetensors" not in names(checkpoint)
    [warning] = checkpoint.warnings
    assert warning.startswith("consolidated.safetensors: ")
    refused(tmp_path, all_files=True)
    shard(tmp_path / "consolidated.safetensors", "all")
    checkpoint = open_checkpoint(tmp_path, all_files=True)
    assert "consolidated.safetensors" in names(checkpoint)
    assert checkpoint.warnings == ()


def test_an_index_that_names_nothing_leaves_nothing(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    index(tmp_path / "model.safetensors.index.json", {})
    assert "its index names none" in refused(tmp_path).message
    assert len(open_checkpoint(tmp_path, all_files=True).shards) == 1


def test_a_tensor_that_the_index_names_must_be_in_its_shard(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", "x")
    shard(tmp_path / "b.safetensors", "y")
    index(tmp_path / "model.safetensors.index.json", {"x": "a.safetensors", "y": "a.safetensors"})
    assert "tensor 'y' is not in a.safetensors" in refused(tmp_path).message


def test_a_tensor_that_the_index_does_not_name_is_a_warning(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", "x", "extra\x1b")
    index(tmp_path / "model.safetensors.index.json", {"x": "a.safetensors"})
    [warning] = open_checkpoint(tmp_path).warnings
    assert warning == "a.safetensors: 1 of its tensors are not in the index: 'extra\\x1b'"


def test_a_cache_snapshot_is_read_from_its_blobs_under_logical_names(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    sharded(snapshot)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    checkpoint = open_checkpoint(snapshot)
    assert len(checkpoint.files) == 5
    assert "tokenizer/vocab.txt" in names(checkpoint)
    assert all(file.path.parent == (repository / "blobs").resolve() for file in checkpoint.files)
    one = open_checkpoint(snapshot / "model-00001-of-00002.safetensors")
    assert names(one) == ["model-00001-of-00002.safetensors"]
    error = refused(repository)
    assert error.hint
    assert "snapshots" in error.hint


@pytest.mark.parametrize("name", ["config.json", "x.safetensors", "model.safetensors.index.json"])
def test_a_dangling_symlink_is_an_error(name: str, tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    (tmp_path / name).symlink_to("nowhere")
    assert refused(tmp_path).message.startswith(f"{name}: a dangling symlink")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    assert refused(tmp_path).message.startswith(f"{name}: a dangling symlink")


def test_a_dangling_symlink_that_would_be_left_anyway_is_no_error(tmp_path: Path) -> None:
    sharded(tmp_path)
    for name in ("consolidated.safetensors", "pytorch_model.bin", ".hidden"):
        (tmp_path / name).symlink_to("nowhere")
    assert len(open_checkpoint(tmp_path).files) == 5


def test_links_to_the_same_bytes_are_files_of_their_own(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.safetensors", "x")
    os.link(path, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").symlink_to(path)
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert len({file.state.inode for file in checkpoint.files}) == 1


def test_loops_of_directories_end(tmp_path: Path) -> None:
    shard(tmp_path / "sub" / "a.safetensors", "x")
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to(".")
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["sub/a.safetensors"]
    assert [warning.split(":")[0] for warning in checkpoint.warnings] == ["self", "sub/up"]


def test_a_knot_of_links_or_a_whole_disk_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "MAX_ENTRIES", 500)
    shard(tmp_path / "a.safetensors", "x")
    folders = [tmp_path / f"d{n}" for n in range(12)]
    for folder in folders:
        folder.mkdir()
    for folder, following in pairwise(folders):
        for link in ("l", "m", "n"):
            (folder / link).symlink_to(following)
    assert "more than 500 files" in refused(tmp_path).message


def test_hidden_files_caches_and_other_weight_formats_are_left(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    for name in (".gitattributes", ".git/config", "__pycache__/m.pyc", ".cache/x.safetensors"):
        write(tmp_path / name)
    write(tmp_path / "._model.safetensors", "AppleDouble")
    assert open_checkpoint(tmp_path).warnings == ()
    for suffix in ("bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx"):
        write(tmp_path / f"w.{suffix}")
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["model.safetensors"]
    [warning] = checkpoint.warnings
    assert warning == "weights in other formats are left out: w.bin, w.gguf, w.h5 and 4 more"


def test_a_sidecar_whose_name_cannot_travel_is_left_with_a_warning(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    write(tmp_path / "-rf", "")
    write(tmp_path / "two\nlines", "")
    write(tmp_path / "ok.txt", "")
    (tmp_path / os.fsdecode(b"latin\xe9")).write_bytes(b"")
    write(tmp_path / "/".join("abcdefgh") / "too-deep.json")
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["model.safetensors", "ok.txt"]
    assert len(checkpoint.warnings) == 4
    for warning in checkpoint.warnings:
        assert warning.isprintable()
        assert warning.isascii()


@pytest.mark.parametrize(
    "name", ["-x.safetensors", "a\tb.safetensors", "-m.safetensors.index.json"]
)
def test_a_shard_or_index_whose_name_cannot_travel_is_an_error(name: str, tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    shard(tmp_path / name, "x")
    assert "cannot be sent" in refused(tmp_path).message
    if not name.endswith("json"):
        assert "cannot be sent" in refused(tmp_path / name).message


def test_names_that_differ_only_in_case_do_not_travel_together(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    write(tmp_path / "README.md")
    write(tmp_path / "Readme.md")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system folds case")
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["README.md", "model.safetensors"]
    assert checkpoint.warnings == (
        "Readme.md: not every file system can hold it beside README.md: left out",
    )
    shard(tmp_path / "MODEL.safetensors", "x")
    assert "MODEL.safetensors and model.safetensors" in refused(tmp_path).message


def test_ten_thousand_clashing_names_cost_no_more_than_as_many_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(tmp_path / "model.safetensors", "x")
    letters = "abcdefghijklmn"
    for number in range(10_000):
        cased = (c.upper() if number >> bit & 1 else c for bit, c in enumerate(letters))
        write(tmp_path / f"{''.join(cased)}.txt")
    if len(list(tmp_path.iterdir())) < 10_001:
        pytest.skip("this file system folds case")
    looked_at: list[str] = []

    def folded(name: str) -> str:
        looked_at.append(name)
        return name.casefold()

    monkeypatch.setattr(names_module, "_folded", folded)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) == 2
    assert len(looked_at) == 10_001
    [warning] = checkpoint.warnings
    assert re.search(r" and \d+ more: not every file system can hold them beside \w+.txt", warning)


def test_the_permission_bits_of_files_and_of_the_folders_above_are_known(tmp_path: Path) -> None:
    modes = {"model.safetensors": 0o600, "run.sh": 0o4755, "private/deep/a.json": 0o644}
    shard(tmp_path / "model.safetensors", "x")
    for name in ("run.sh", "private/deep/a.json"):
        write(tmp_path / name)
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    for folder, mode in {"private/deep": 0o755, "private": 0o2710, "": 0o1775}.items():
        (tmp_path / folder).chmod(mode)
    found = {file.name: (file.mode, file.folder_mode) for file in open_checkpoint(tmp_path).files}
    assert found == {
        "model.safetensors": (0o600, 0o775),
        "run.sh": (0o755, 0o775),
        "private/deep/a.json": (0o644, 0o710),
    }


def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
        checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["model.safetensors"]
    assert len(checkpoint.warnings) == 3
    assert "neither a file nor a directory" in refused(tmp_path / "fifo").message
    os.mkfifo(tmp_path / "x.safetensors")
    assert "x.safetensors: not a regular file" in refused(tmp_path).message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(tmp_path / "model.safetensors", "x")
    write(tmp_path / "config.json")
    real_open: Callable[..., int] = os.open

    def without_permission(path: Path, *args: int, **more: int) -> int:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **more)

    # Not chmod: the tests may run as root, who may read everything.
    monkeypatch.setattr(os, "open", without_permission)
    assert refused(tmp_path).message == f"{name}: cannot be read: permission denied"


def test_a_directory_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(tmp_path / "sub" / "model.safetensors", "x")
    real_listdir = os.listdir

    def without_permission(path: Path) -> list[str]:
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied")
        return real_listdir(path)

    monkeypatch.setattr(os, "listdir", without_permission)
    assert refused(tmp_path).message == "sub/: cannot be read: permission denied"


def test_a_path_that_is_no_checkpoint_is_explained(tmp_path: Path) -> None:
    assert "no such file or directory" in refused(tmp_path / "absent").message
    assert "no .safetensors file" in refused(tmp_path).message
    write(tmp_path / "pytorch_model.bin")
    hint = refused(tmp_path).hint
    assert hint
    assert "pytorch_model.bin" in hint
    assert "not a safetensors file" in refused(tmp_path / "pytorch_model.bin").message
    index(tmp_path / "model.safetensors.index.json", {})
    hint = refused(tmp_path / "model.safetensors.index.json").hint
    assert hint
    assert str(tmp_path) in hint
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    assert "dangling symlink" in refused(tmp_path / "link.safetensors").message


def test_a_truncated_shard_is_named_by_its_logical_name(tmp_path: Path) -> None:
    path = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    nbytes = path.stat().st_size
    os.truncate(path, nbytes - 5)
    assert refused(tmp_path).message == (
        f"model-00002-of-00002.safetensors: truncated: {nbytes - 5} bytes, expected {nbytes}"
    )


def test_the_fingerprint_tells_checkpoints_apart_by_names_sizes_and_headers(tmp_path: Path) -> None:
    one, other = sharded(tmp_path / "one"), sharded(tmp_path / "other")
    fingerprint = open_checkpoint(one).fingerprint()
    os.utime(other / "config.json", (1, 1))
    assert open_checkpoint(other).fingerprint() == fingerprint
    changes: list[Callable[[], object]] = [
        lambda: write(other / "config.json", "{ }"),
        lambda: (other / "config.json").rename(other / "config.jsom"),
        lambda: shard(
            other / "model-00002-of-00002.safetensors", "layers.1.w", "lm_heaD", "lm_head"
        ),
    ]
    seen = {fingerprint}
    for change in changes:
        change()
        seen.add(open_checkpoint(other).fingerprint())
    assert len(seen) == 1 + len(changes)


def test_a_file_that_is_rewritten_while_its_header_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "model.safetensors", "x")
    before, data = path.stat(), path.read_bytes()
    real_header_of = sourcefile_module.header_of

    def rewritten_meanwhile(fd: int, nbytes: int, where: str, limits: HeaderLimits) -> Header:
        header = real_header_of(fd, nbytes, where, limits)
        path.write_bytes(data[:-1] + b"x")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return header

    time.sleep(0.02)  # for the change time, which moves in ticks of the kernel
    monkeypatch.setattr(sourcefile_module, "header_of", rewritten_meanwhile)
    assert refused(tmp_path).message.startswith(
        "model.safetensors changed while it was being opened: it was written and its time set back"
    )


@pytest.mark.parametrize("seconds", [10_000_000_000, -10_000_000_000])
def test_a_time_that_nanoseconds_do_not_hold_travels_as_the_nearest(
    tmp_path: Path, seconds: int
) -> None:
    path = shard(tmp_path / "model.safetensors", "x")
    time_ns = seconds * 10**9
    os.utime(path, ns=(time_ns, time_ns))
    if path.stat().st_mtime_ns != time_ns:
        pytest.skip("this file system has no such time")
    checkpoint = open_checkpoint(tmp_path)
    [file] = checkpoint.files
    assert file.mtime_ns == (MAX_MTIME_NS if seconds > 0 else -MAX_MTIME_NS)
    assert file.state.mtime_ns == time_ns  # as it is compared with later
    assert checkpoint.warnings == (
        "1 modification time is outside of the years 1678 to 2262, and copied as the nearest one"
        " inside: model.safetensors",
    )
    assert open_checkpoint(path).warnings == checkpoint.warnings


def test_neither_torch_nor_numpy_is_imported() -> None:
    names = (module.name for module in iter_modules(packcast.checkpoint.__path__))
    modules = ", ".join(f"packcast.checkpoint.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
