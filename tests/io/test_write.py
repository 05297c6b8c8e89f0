"""WriteSink up to publishing: what it makes, what it refuses, what it leaves behind."""

from __future__ import annotations

import errno
import os
import random
import resource
import stat
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import DestinationError
from packcast.io import files, syscalls
from packcast.io.sinks.ownership import RECORD
from packcast.io.sinks.write import WriteSink
from tests.helpers.commands import run_warm
from tests.helpers.processes import num_descriptors
from tests.io.sinks import (
    CONTENT,
    MTIME_NS,
    Putting,
    copy,
    failing,
    filled,
    finished,
    names_in,
    prepared,
    put_all,
    runs_of,
    tree,
    write_tree,
)

IS_ROOT = os.geteuid() == 0


pytestmark = pytest.mark.usefixtures("pool")


# -- what it makes -------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["out", "a/b/out"])
def test_the_copy_appears_at_once_with_the_same_bytes_and_times(tmp_path: Path, out: str) -> None:
    target = tmp_path / out
    sink = finished(target)
    assert names_in(target.parent) == [".out.packcast-t1"]
    sink.publish()
    assert (sink.wrote, sink.published, sink.notes) == (True, True, [])
    assert tree(target) == CONTENT
    assert {(target / name).stat().st_mtime_ns for name in CONTENT} == {MTIME_NS}
    assert names_in(target.parent) == ["out"]


def test_runs_may_come_in_any_order(tmp_path: Path) -> None:
    content = {"a.bin": os.urandom(1_000_003), "b.bin": os.urandom(500_000)}
    sink = prepared(tmp_path / "out", content)
    runs = runs_of(content, 10_007)
    random.Random(1).shuffle(runs)
    Putting(sink, runs).run()
    sink.finish()
    sink.publish()
    assert tree(tmp_path / "out") == content


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def with_modes(target: Path, modes: Mapping[str, tuple[int, int]]) -> WriteSink:
    """A sink of empty files of these modes, each with that of its folders; the files are there."""
    files = [FileSpec(name, 0, MTIME_NS, *both, None) for name, both in modes.items()]
    sink = WriteSink(target, files, transfer_id="t", force=False)
    sink.prepare()
    return sink


@pytest.mark.parametrize(
    ("mask", "modes"),
    [
        (0o022, {"": 0o755, "a": 0o600, "b": 0o755, "in": 0o755, "in/c": 0o644, "in/d": 0o600}),
        (0o026, {"": 0o751, "a": 0o600, "b": 0o751, "in": 0o751, "in/c": 0o640, "in/d": 0o600}),
        (0o077, {"": 0o700, "a": 0o600, "b": 0o700, "in": 0o700, "in/c": 0o600, "in/d": 0o600}),
        (0o000, {"": 0o775, "a": 0o600, "b": 0o755, "in": 0o755, "in/c": 0o664, "in/d": 0o600}),
    ],
)
def test_modes_are_the_sources_less_the_umask(
    tmp_path: Path, mask: int, modes: dict[str, int]
) -> None:
    offered = {
        "a": (0o600, 0o775),
        "b": (0o755, 0o775),
        "in/c": (0o664, 0o755),
        "in/d": (0o000, 0o755),
    }
    with umask(mask):
        sink = with_modes(tmp_path / "out", offered)
        sink.finish()
        sink.publish()
    assert {name: mode_of(tmp_path / "out" / name) for name in modes} == modes


@given(st.integers(0, 0o777), st.integers(0, 0o777), st.integers(0, 0o777), st.integers(0, 0o077))
def test_nothing_is_ever_more_open_than_its_source(
    tmp_path_factory: pytest.TempPathFactory, mode: int, folder: int, nested: int, mask: int
) -> None:
    out = tmp_path_factory.getbasetemp() / f"out-{uuid.uuid4().hex}"
    with umask(mask):
        sink = with_modes(out, {"a": (mode, folder), "in/deep/b": (mode, folder & nested)})
        partial = Path(str(sink.left()))
        found = {str(path.relative_to(partial)): mode_of(path) for path in partial.rglob("*")}
        found[""] = mode_of(partial)
        sink.abort()
    assert found.pop(RECORD)
    file, shut = (mode | 0o600) & ~mask, (folder & nested | 0o700) & ~mask
    assert found == {
        "": (folder | 0o700) & ~mask,
        "a": file,
        "in": shut,
        "in/deep": shut,
        "in/deep/b": file,
    }


def test_modes_hold_where_a_mount_point_or_the_current_directory_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    with umask(0o022):
        sink = with_modes(tmp_path, {"a": (0o600, 0o700), "in/deep/b": (0o644, 0o700)})
        sink.finish()
        sink.publish()
    found = {str(path.relative_to(tmp_path)): mode_of(path) for path in tmp_path.rglob("*")}
    assert found == {"a": 0o600, "in": 0o700, "in/deep": 0o700, "in/deep/b": 0o644}
    assert mode_of(tmp_path) == 0o755  # it was there


def test_space_is_reserved_before_any_byte_comes(tmp_path: Path) -> None:
    sink = prepared(tmp_path / "out", {"big.bin": b"x" * 1_000_000})
    reserved = (tmp_path / ".out.packcast-t1" / "big.bin").stat()
    assert reserved.st_size == 1_000_000
    assert reserved.st_blocks * 512 >= 1_000_000
    sink.abort()


def test_an_empty_offer_and_an_offer_of_empty_files_are_copies_too(tmp_path: Path) -> None:
    copy(tmp_path / "none", {})
    copy(tmp_path / "empty", {"empty.txt": b""})
    assert tree(tmp_path / "none") == {}
    assert (tmp_path / "none").is_dir()
    assert tree(tmp_path / "empty") == {"empty.txt": b""}


def test_more_files_than_may_be_open_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 8)
    content = {f"f{index:03}.bin": b"%d" % index * 100 for index in range(200)}
    num_before = num_descriptors()
    sink = prepared(tmp_path / "out", content)
    assert num_descriptors() <= num_before + 8 + 3
    put_all(sink, content, step=50)
    sink.finish()
    sink.publish()
    assert tree(tmp_path / "out") == content
    assert num_descriptors() == num_before


def test_a_low_soft_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        content = {f"f{index:03}.bin": b"x" for index in range(400)}
        copy(tmp_path / "out", content)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 400 + 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(tree(tmp_path / "out")) == 400


# -- what it refuses -----------------------------------------------------------------------------


def refusal(target: Path, content: Mapping[str, bytes] = CONTENT, *, force: bool = False) -> str:
    with pytest.raises(DestinationError) as caught:
        prepared(target, content, force=force)
    assert caught.value.exit_code == 7
    assert "\n" not in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


LONG = "x" * 256


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("full", "exists and is not empty | replace it with --force"),
        ("file", "file is not a directory"),
        ("file/out", "/file is not a directory"),
        ("file/a/b/out", "/file is not a directory"),
        (LONG, "the name is too long"),
        (f"{LONG}/out", "the name is too long"),
        ("loop", "is a symbolic link"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_and_nothing_is_changed(
    tmp_path: Path, target: str, says: str
) -> None:
    content = {"full/config.json": b"old", "file": b"mine"}
    write_tree(tmp_path, content)
    (tmp_path / "loop").symlink_to("loop")
    assert says in refusal(tmp_path / target)
    if target == "file":
        assert says in refusal(tmp_path / target, force=True)
    assert tree(tmp_path) == content
    assert names_in(tmp_path) == ["file", "full", "loop"]


def test_the_longest_name_that_is_allowed_works(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 255)
    sink = prepared(long)
    other = prepared(tmp_path / ("x" * 254 + "y"))
    assert sink.wrote
    assert other.wrote
    other.abort()
    put_all(sink)
    sink.finish()
    sink.publish()
    assert tree(long) == CONTENT


def test_a_read_only_file_system_is_refused(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "the file system is read-only" in refusal(small_disk / "out")
    assert "the file system is read-only" in refusal(small_disk / "a" / "out")
    assert "the file system is read-only" in refusal(small_disk)


def test_no_permission_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from packcast.io.sinks.write import WriteSink\n"
        "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: WriteSink(Path(sys.argv[1]), [], transfer_id='t', force=False).prepare()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    if not IS_ROOT:
        pytest.skip("needs root, to become nobody")
    for target in (tmp_path / "out", tmp_path / "a" / "out"):
        found = run_warm(script, target)
        assert found.stdout.startswith("DestinationError cannot "), found
        assert "permission denied" in found.stdout
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["../escaped", "/etc/x", "a/../b", ".hidden", ""])
def test_a_hostile_name_or_id_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    assert "the offered name" in refusal(tmp_path / "d" / "out", {name: b"x"})
    with pytest.raises(DestinationError, match="is not an id of a transfer"):
        prepared(tmp_path / "out", transfer_id=name)
    assert names_in(tmp_path) == []


# -- space ---------------------------------------------------------------------------------------


def test_a_full_disk_says_so_before_any_byte_and_leaves_nothing(
    small_disk: Path, monkeypatch
) -> None:
    said = refusal(small_disk / "out", {"a.bin": bytes(3 << 20), "b.bin": bytes(3 << 20)})
    assert "no space left" in said
    assert "6.0 MiB needed, 4.0 MiB free" in said
    monkeypatch.setattr(syscalls, "fallocate", failing(errno.EDQUOT))
    assert "the disk quota is used up" in refusal(small_disk / "out")
    assert names_in(small_disk) == []


def test_a_full_disk_names_what_a_killed_transfer_left_behind(small_disk: Path) -> None:
    write_tree(small_disk / ".out.packcast-old", {"a.bin": bytes(3 << 20)})
    said = refusal(small_disk / "out", {"a.bin": bytes(3 << 20)})
    assert f"{small_disk}/.out.packcast-old (3.0 MiB)" in said
    assert f"packcast clean {small_disk}" in said


def test_without_fallocate_free_space_is_compared(small_disk: Path, monkeypatch) -> None:
    monkeypatch.setattr(syscalls, "fallocate", failing(errno.EOPNOTSUPP))
    said = refusal(small_disk / "out", {"a.bin": bytes(6 << 20)})
    assert "6.0 MiB needed, 4.0 MiB free" in said
    assert names_in(small_disk) == []
    sink = copy(small_disk / "out")
    assert tree(small_disk / "out") == CONTENT
    assert "compared only" in sink.notes[0]


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    sink = prepared(tmp_path / "out")
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), sink._table.open(2))
    says = r"cannot write .*/out/model-00001.*safetensors: no space left"
    with pytest.raises(DestinationError, match=says):
        put_all(sink)
    sink.abort()
    assert names_in(tmp_path) == []


def test_a_disk_that_fails_at_the_end_names_the_file(tmp_path: Path, monkeypatch) -> None:
    sink = filled(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(DestinationError, match=r"config\.json: input/output error"):
            sink.finish()
    sink.abort()
    assert names_in(tmp_path) == []


def test_a_file_that_cannot_be_closed_is_a_failed_write(tmp_path: Path, monkeypatch) -> None:
    """As on NFS, which tells only then; and tells it once, so fsync would not know any more."""
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 1)
    content = {f"{name}.bin": b"x" * 1000 for name in "abc"}
    sink = prepared(tmp_path / "out", content)
    close = os.close

    def late(fd: int) -> None:
        name = os.readlink(f"/proc/self/fd/{fd}")
        close(fd)
        if name.endswith("a.bin"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", late)
        with pytest.raises(DestinationError, match=r"write .*/out/a\.bin: the disk quota"):
            put_all(sink, content)
    sink.abort()
    assert names_in(tmp_path) == []
