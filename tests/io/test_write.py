"""WriteSink up to publishing: what it makes, what it refuses, what it leaves behind."""

from __future__ import annotations

import errno
import os
import random
import resource
import stat
import subprocess
import sys
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
from tests.helpers.processes import num_descriptors
from tests.io.sinks import (
    CONTENT,
    MTIME_NS,
    Putting,
    copy,
    names_in,
    put_all,
    runs_of,
    sink_for,
    tree,
    write_tree,
)

IS_ROOT = os.geteuid() == 0


pytestmark = pytest.mark.usefixtures("pool")


def failing(code: int):
    def call(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


# -- what it makes -------------------------------------------------------------------------------


def test_the_copy_has_the_same_bytes_in_the_same_folders(tmp_path: Path) -> None:
    sink = copy(tmp_path / "out")
    assert sink.wrote
    assert sink.published
    assert sink.notes == []
    assert tree(tmp_path / "out") == CONTENT
    assert names_in(tmp_path) == ["out"]


def test_runs_may_come_in_any_order(tmp_path: Path) -> None:
    content = {"a.bin": os.urandom(1_000_003), "b.bin": os.urandom(500_000)}
    sink = sink_for(tmp_path / "out", content)
    sink.prepare()
    runs = runs_of(content, 10_007)
    random.Random(1).shuffle(runs)
    Putting(sink, runs).run()
    sink.finish()
    sink.publish()
    assert tree(tmp_path / "out") == content


def test_missing_parents_are_made(tmp_path: Path) -> None:
    copy(tmp_path / "a" / "b" / "out")
    assert tree(tmp_path / "a" / "b" / "out") == CONTENT


def test_nothing_shows_under_the_targets_name_before_publish(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "out")
    sink.prepare()
    put_all(sink)
    sink.finish()
    assert names_in(tmp_path) == [".out.packcast-t1"]
    sink.publish()
    assert names_in(tmp_path) == ["out"]


def test_times_are_the_sources(tmp_path: Path) -> None:
    copy(tmp_path / "out")
    found = {(tmp_path / "out" / name).stat().st_mtime_ns for name in CONTENT}
    assert found == {MTIME_NS}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def prepared(target: Path, modes: Mapping[str, tuple[int, int]]) -> WriteSink:
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
        sink = prepared(tmp_path / "out", offered)
        sink.finish()
        sink.publish()
    assert {name: mode_of(tmp_path / "out" / name) for name in modes} == modes


@given(st.integers(0, 0o777), st.integers(0, 0o777), st.integers(0, 0o777), st.integers(0, 0o077))
def test_nothing_is_ever_more_open_than_its_source(
    tmp_path_factory: pytest.TempPathFactory, mode: int, folder: int, nested: int, mask: int
) -> None:
    out = tmp_path_factory.getbasetemp() / f"out-{uuid.uuid4().hex}"
    with umask(mask):
        sink = prepared(out, {"a": (mode, folder), "in/deep/b": (mode, folder & nested)})
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
        sink = prepared(tmp_path, {"a": (0o600, 0o700), "in/deep/b": (0o644, 0o700)})
        sink.finish()
        sink.publish()
    found = {str(path.relative_to(tmp_path)): mode_of(path) for path in tmp_path.rglob("*")}
    assert found == {"a": 0o600, "in": 0o700, "in/deep": 0o700, "in/deep/b": 0o644}
    assert mode_of(tmp_path) == 0o755  # it was there


def test_space_is_reserved_before_any_byte_comes(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "out", {"big.bin": b"x" * 1_000_000})
    sink.prepare()
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
    sink = sink_for(tmp_path / "out", content)
    sink.prepare()
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


def test_a_short_write_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    copy(tmp_path / "out")
    assert tree(tmp_path / "out") == CONTENT


# -- what it refuses -----------------------------------------------------------------------------


def refusal(target: Path, content: dict[str, bytes] | None = None, *, force: bool = False) -> str:
    sink = sink_for(target, CONTENT if content is None else content, force=force)
    with pytest.raises(DestinationError) as caught:
        sink.prepare()
    sink.abort()
    assert caught.value.exit_code == 7
    assert "\n" not in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


def test_a_target_with_content_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", {"config.json": b"old"})
    assert "exists and is not empty | replace it with --force" in refusal(tmp_path / "out")
    assert tree(tmp_path) == {"out/config.json": b"old"}


def test_a_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    assert "out is not a directory" in refusal(tmp_path / "out")
    assert "out is not a directory" in refusal(tmp_path / "out", force=True)
    assert tree(tmp_path) == {"out": b"mine"}


def test_a_target_below_a_file_is_refused_by_that_files_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for below in ("file/out", "file/a/b/out"):
        assert f"{tmp_path}/file is not a directory" in refusal(tmp_path / below)
    assert names_in(tmp_path) == ["file"]


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert "the name is too long" in refusal(tmp_path / ("x" * 256))
    assert "the name is too long" in refusal(tmp_path / ("x" * 256) / "out")
    assert names_in(tmp_path) == []


def test_the_longest_name_that_is_allowed_works(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 255)
    sink = sink_for(long)
    sink.prepare()
    other = sink_for(tmp_path / ("x" * 254 + "y"))
    other.prepare()
    assert sink.wrote
    assert other.wrote
    other.abort()
    put_all(sink)
    sink.finish()
    sink.publish()
    assert tree(long) == CONTENT


def test_a_symlink_loop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    refusal(tmp_path / "out")


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
        found = subprocess.run([sys.executable, "-c", script, target], capture_output=True)
        assert found.stdout.startswith(b"DestinationError cannot "), found
        assert b"permission denied" in found.stdout
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["../escaped", "/etc/x", "a/../b", ".hidden", ""])
def test_a_hostile_name_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    assert "the offered name" in refusal(tmp_path / "d" / "out", {name: b"x"})
    assert names_in(tmp_path) == []


def test_a_hostile_transfer_id_never_becomes_a_path(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "out", transfer_id="../../x")
    with pytest.raises(DestinationError):
        sink.prepare()
    assert names_in(tmp_path) == []


# -- space ---------------------------------------------------------------------------------------


def test_a_full_disk_says_so_before_any_byte_and_leaves_nothing(small_disk: Path) -> None:
    said = refusal(small_disk / "out", {"a.bin": bytes(3 << 20), "b.bin": bytes(3 << 20)})
    assert "no space left" in said
    assert "6.0 MiB needed, 4.0 MiB free" in said
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


def test_a_quota_is_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(syscalls, "fallocate", failing(errno.EDQUOT))
    assert "the disk quota is used up" in refusal(tmp_path / "out")
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_names_the_file(small_disk: Path, monkeypatch) -> None:
    monkeypatch.setattr(syscalls, "fallocate", failing(errno.EOPNOTSUPP))
    content = {"a.bin": bytes(3 << 20)}
    sink = sink_for(small_disk / "out", content)
    sink.prepare()
    (small_disk / "other").write_bytes(bytes(2 << 20))
    with pytest.raises(DestinationError, match=r"cannot write .*/out/a\.bin: no space left"):
        put_all(sink, content)
    sink.abort()
    assert names_in(small_disk) == ["other"]


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "out")
    sink.prepare()
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), sink._table.open(2))
    says = r"cannot write .*/out/model-00001.*safetensors: no space left"
    with pytest.raises(DestinationError, match=says):
        put_all(sink)
    sink.abort()
    assert names_in(tmp_path) == []


def test_a_disk_that_fails_at_the_end_names_the_file(tmp_path: Path, monkeypatch) -> None:
    sink = sink_for(tmp_path / "out")
    sink.prepare()
    put_all(sink)
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
    sink = sink_for(tmp_path / "out", content)
    sink.prepare()
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
