"""Publishing: one step where it can be had, and what --force may and may not replace."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from packcast.errors import DestinationError
from packcast.io import syscalls
from packcast.io.sinks import ownership, publish
from tests.io.sinks import (
    CONTENT,
    copy,
    failing,
    finished,
    names_in,
    prepared,
    put_all,
    tree,
    without,
    write_tree,
)


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """A directory that a file system of its own is mounted on."""
    mount = tmp_path / "mount"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def refused(target: Path) -> str:
    with pytest.raises(DestinationError) as caught:
        prepared(target, force=True, transfer_id="t2")
    assert caught.value.exit_code == 7
    assert not any(".packcast-t2" in name for name in names_in(target.parent))
    return caught.value.message


# -- without --force -----------------------------------------------------------------------------


def test_an_empty_directory_counts_as_absent_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    sink = copy(tmp_path / "out")
    assert tree(tmp_path / "out") == CONTENT
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert sink.notes == []
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["out", "out/mine.txt"])
def test_a_file_or_directory_that_appeared_meanwhile_is_not_touched(
    tmp_path: Path, force: bool, name: str
) -> None:
    sink = finished(tmp_path / "out", force=force, transfer_id="t2")
    write_tree(tmp_path, {name: b"mine"})
    with pytest.raises(DestinationError) as caught:
        sink.publish()
    assert str(tmp_path / ".out.packcast-t2") in str(caught.value.hint)
    assert (tmp_path / name).read_bytes() == b"mine"
    assert names_in(tmp_path) == [".out.packcast-t2", "out"]
    assert tree(tmp_path / ".out.packcast-t2") == CONTENT
    assert not sink.published


def test_the_target_may_be_written_in_many_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, lands_in in (
        ("a/", "a"),
        ("./b", "b"),
        ("c/../d", "d"),
        ("e/f/", "e/f"),
        (str(tmp_path / "g") + "/.", "g"),
    ):
        copy(Path(given))
        assert tree(tmp_path / lands_in) == CONTENT


def test_the_current_directory_is_filled_rather_than_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    sink = copy(Path("."))
    assert here.stat().st_ino == inode
    assert tree(here) == CONTENT
    assert names_in(here) == sorted({name.split("/")[0] for name in CONTENT})
    assert "file by file" in sink.notes[0]
    assert "current directory" in sink.notes[0]


@pytest.mark.parametrize("leads_to", ["real", "later", "out"])
def test_a_target_that_is_a_symlink_is_not_followed(tmp_path: Path, leads_to: str) -> None:
    copy(tmp_path / "real", {"config.json": b"old"})
    (tmp_path / "out").symlink_to(leads_to)
    assert "is a symbolic link" in refused(tmp_path / "out")
    assert tree(tmp_path / "real") == {"config.json": b"old"}
    assert names_in(tmp_path) == ["out", "real"]


def test_a_symlink_above_the_target_is_part_of_the_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    copy(tmp_path / "link" / "out")
    assert tree(tmp_path / "real" / "out") == CONTENT


# -- with --force --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [None, {}, {"config.json": b"by hand", "nested/deeper/vocab.txt": b""}]
)
def test_force_replaces_files_with_offered_names_of_any_writer(
    tmp_path: Path, content: dict[str, bytes] | None
) -> None:
    if content is not None:
        (tmp_path / "out").mkdir()
        write_tree(tmp_path / "out", content)
    sink = copy(tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == CONTENT
    assert names_in(tmp_path) == ["out"]
    assert sink.notes == []


def test_force_replaces_an_earlier_copy_of_another_checkpoint(tmp_path: Path) -> None:
    copy(tmp_path / "out", {"old-1.safetensors": b"1", "x/y/z.txt": b"2"})
    assert os.getxattr(tmp_path / "out/old-1.safetensors", ownership.MARK).startswith(b"1 t1 1 ")
    copy(tmp_path / "out", force=True, transfer_id="t2")
    assert tree(tmp_path / "out") == CONTENT
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("foreign", ["notes.txt", "nested/mine.txt", "runs/a/log.txt", ".git"])
def test_force_names_what_is_foreign_and_keeps_its_hands_off(tmp_path: Path, foreign: str) -> None:
    write_tree(tmp_path / "out", {"config.json": b"old", foreign: b"mine"})
    assert foreign in refused(tmp_path / "out")
    assert tree(tmp_path / "out") == {"config.json": b"old", foreign: b"mine"}


def test_symlinks_fifos_and_other_peoples_empty_folders_are_foreign(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for make in (
        lambda: (out / "config.json").symlink_to("/etc/passwd"),
        lambda: (out / "nested").symlink_to("/etc"),
        lambda: os.mkfifo(out / "empty.txt"),
        lambda: (out / "plans").mkdir(),
    ):
        out.mkdir()
        make()
        (name,) = names_in(out)
        assert name in refused(out)
        assert names_in(out) == [name]
        out.rename(tmp_path / f"was-{name}")


def test_a_copy_that_was_changed_since_is_foreign(tmp_path: Path) -> None:
    old = {"a.safetensors": b"11", "b.safetensors": b"22", "c.safetensors": b"33"}
    copy(tmp_path / "out", old)
    (tmp_path / "out/b.safetensors").write_bytes(b"edited")
    os.utime(tmp_path / "out/c.safetensors")
    said = refused(tmp_path / "out")
    assert "b.safetensors, c.safetensors" in said
    assert "a.safetensors" not in said


def test_of_very_many_foreign_files_three_are_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", {f"f{index:03}": b"" for index in range(200)})
    assert refused(tmp_path / "out").endswith(": f000, f001, f002 and more")


def test_without_xattrs_only_the_offers_names_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "setxattr", failing(errno.EOPNOTSUPP))
    copy(tmp_path / "same")
    copy(tmp_path / "same", force=True, transfer_id="t2")
    copy(tmp_path / "other", {"old.safetensors": b""})
    assert "old.safetensors" in refused(tmp_path / "other")


def test_what_a_killed_transfer_staged_inside_may_be_replaced(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", {".packcast-t0/config.json": b"", "config.json": b"old"})
    copy(tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == CONTENT
    write_tree(tmp_path / "next", {".packcast-t0/mine.txt": b""})
    assert ".packcast-t0/mine.txt" in refused(tmp_path / "next")


def test_foreign_files_that_came_during_the_transfer_stop_the_exchange(tmp_path: Path) -> None:
    copy(tmp_path / "out", {"config.json": b"old"})
    sink = finished(tmp_path / "out", force=True, transfer_id="t2")
    (tmp_path / "out/mine.txt").write_bytes(b"mine")
    with pytest.raises(DestinationError, match=r"mine\.txt") as caught:
        sink.publish()
    assert "kept in" in str(caught.value.hint)
    assert tree(tmp_path / "out") == {"config.json": b"old", "mine.txt": b"mine"}


def test_foreign_files_that_came_during_the_exchange_survive_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tmp_path / "out", {"config.json": b"old", "nested/deeper/vocab.txt": b""})

    def exchange(dir_fd: int, one: str, other: str) -> None:
        (tmp_path / "out/nested/mine.txt").write_bytes(b"mine")
        syscalls.exchange(dir_fd, one, other)

    monkeypatch.setattr(publish, "exchange", exchange)
    sink = finished(tmp_path / "out", force=True, transfer_id="t2")
    sink.publish()
    assert tree(tmp_path / "out") == CONTENT
    assert tree(tmp_path / ".out.packcast-t2") == {"nested/mine.txt": b"mine"}
    assert str(tmp_path / ".out.packcast-t2") in sink.notes[0]


def test_a_reader_sees_the_old_copy_or_the_new_one_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    versions = [{"a.bin": b"%d" % number, "b.bin": b"%d" % number} for number in range(30)]
    copy(out, versions[0])
    seen: list[tuple[bytes, ...]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            fd = os.open(out, os.O_RDONLY)  # never absent
            try:
                seen.append(tuple(sorted(os.fsencode(name) for name in os.listdir(fd))))
            finally:
                os.close(fd)

    reader = threading.Thread(target=read)
    reader.start()
    for number, version in enumerate(versions[1:]):
        copy(out, version, force=True, transfer_id=f"v{number}")
    stop.set()
    reader.join()
    # An old directory that is being removed may be seen with fewer files by who opened it before.
    assert set(seen) <= {(b"a.bin", b"b.bin"), (b"b.bin",), ()}
    assert tree(out) == versions[-1]


# -- where one step cannot be had ----------------------------------------------------------------


def test_a_mount_point_is_filled_file_by_file(mount_point: Path) -> None:
    (mount_point / "lost+found").mkdir()
    sink, other = prepared(mount_point), prepared(mount_point)
    assert (sink.wrote, other.wrote) == (True, False)
    assert ".packcast-t1" in names_in(mount_point)
    put_all(sink)
    sink.finish()
    sink.publish()
    assert tree(mount_point) == CONTENT
    assert "mount point" in sink.notes[0]
    assert ".packcast-t1" not in names_in(mount_point)
    copy(mount_point, without(CONTENT, ["empty.txt"]), force=True, transfer_id="t2")
    assert tree(mount_point) == without(CONTENT, ["empty.txt"])


def test_a_bind_mount_of_the_same_file_system_is_a_mount_point_too(tmp_path: Path) -> None:
    for name in ("behind", "out"):
        (tmp_path / name).mkdir()
    command = ["mount", "--bind", str(tmp_path / "behind"), str(tmp_path / "out")]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot bind a mount here")
    try:
        sink = copy(tmp_path / "out")
        assert tree(tmp_path / "behind") == CONTENT
        assert "mount point" in sink.notes[0]
        prepared(tmp_path / "out", force=True, transfer_id="t2").abort()
        assert tree(tmp_path / "behind") == CONTENT
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "out")], check=True)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY])
def test_without_the_exchange_files_are_replaced_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(publish, "exchange", failing(code))
    copy(tmp_path / "out", {"config.json": b"old", "gone/too/far.txt": b"", "nested": b"a file"})
    sink = copy(tmp_path / "out", force=True, transfer_id="t2")
    assert tree(tmp_path / "out") == CONTENT
    assert not (tmp_path / "out/gone").exists()
    assert "file by file" in sink.notes[0]
    assert names_in(tmp_path) == ["out"]


def test_file_by_file_never_shows_an_index_over_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "exchange", failing(errno.EINVAL))
    index = "model.safetensors.index.json"
    copy(tmp_path / "out", {**CONTENT, "model-00003-of-00003.safetensors": b"", index: b"[]"})
    sink = finished(tmp_path / "out", force=True, transfer_id="t2")
    seen: list[set[str]] = []
    move = publish._move

    def watched(from_fd: int, into_fd: int, name: str) -> None:
        seen.append(set(names_in(tmp_path / "out")))
        move(from_fd, into_fd, name)

    monkeypatch.setattr(publish, "_move", watched)
    sink.publish()
    assert len(seen) == len(CONTENT)
    assert all(index not in names for names in seen)
    assert "model-00003-of-00003.safetensors" not in seen[-1]
    assert tree(tmp_path / "out") == CONTENT


def test_a_writable_directory_in_one_that_is_not_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path) and real(path, mode))
    sink = copy(tmp_path / "out")
    assert tree(tmp_path / "out") == CONTENT
    assert f"{tmp_path} is not writable" in sink.notes[0]


def test_renaming_into_place_that_fails_keeps_the_proven_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = finished(tmp_path / "out", transfer_id="t2")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing(errno.EIO))
        with pytest.raises(DestinationError, match=r"cannot publish .*: input/output error"):
            sink.publish()
    sink.abort()
    assert tree(tmp_path / ".out.packcast-t2") == CONTENT


def test_exchange_works_by_number_where_libc_has_no_name_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldLibc:
        syscall = syscalls._libc.syscall

    monkeypatch.setattr(syscalls, "_libc", OldLibc)
    write_tree(tmp_path, {"a/one": b"", "b/two": b""})
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        syscalls.exchange(fd, "a", "b")
        with pytest.raises(FileNotFoundError):
            syscalls.exchange(fd, "a", "absent")
    finally:
        os.close(fd)
    assert names_in(tmp_path / "a") == ["two"]
