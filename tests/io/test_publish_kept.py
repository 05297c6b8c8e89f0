"""What publishing keeps of a directory that was there, and what it says of a disk that fails."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from packcast.errors import DestinationError
from packcast.io.sinks import attributes
from tests.io.sinks import CONTENT, copy, failing, finished, names_in, tree

# -- what the directory that was there had -------------------------------------------------------


def as_somebody(uid: int, work: Callable[[], object]) -> None:
    """Do the work in a fork that is this user, in this group only."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def only_root() -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")


@pytest.mark.parametrize("force", [False, True])
def test_the_directory_keeps_owner_group_mode_and_attributes(tmp_path: Path, force: bool) -> None:
    only_root()
    out = tmp_path / "out"
    copy(out, {"config.json": b"old"}) if force else out.mkdir()
    os.chown(out, 1234, 4321)
    out.chmod(0o2750)
    os.setxattr(out, "user.kept", b"as it was")
    inode = out.stat().st_ino
    sink = copy(out, force=force, transfer_id="t2")
    found = out.stat()
    assert found.st_ino != inode, "it was replaced in one step"
    assert (found.st_uid, found.st_gid) == (1234, 4321)
    assert stat.S_IMODE(found.st_mode) == 0o2750
    assert os.getxattr(out, "user.kept") == b"as it was"
    assert tree(out) == CONTENT
    # What is made in such a directory has its group.
    assert {path.stat().st_gid for path in out.rglob("*")} == {4321}
    assert sink.notes == []


def test_a_directory_that_its_owner_may_not_write_keeps_that_mode(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    copy(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o500


def test_a_default_access_list_is_kept_and_inherited(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # version 2; user:: rwx, user:1234 rwx, group:: rx, mask:: rwx, other:: none
    entries = [(1, 7, -1), (2, 7, 1234), (4, 5, -1), (16, 7, -1), (32, 0, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(out, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("no access lists here")
    copy(out)
    assert os.getxattr(out, "system.posix_acl_default") == acl
    assert b"\xd2\x04" in os.getxattr(out / "config.json", "system.posix_acl_access")


def test_flags_of_the_file_system_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["chattr", "+d", str(out)], capture_output=True).returncode:
        pytest.skip("no flags here")
    copy(out)
    fd = os.open(out, os.O_RDONLY)
    try:
        assert attributes._flags(fd) & 0x40
    finally:
        os.close(fd)


def test_a_directory_of_another_owner_is_filled_where_it_could_not_be_given_away(
    tmp_path: Path,
) -> None:
    only_root()
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o111)
    tmp_path.chmod(0o777)
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    inode = out.stat().st_ino
    as_somebody(1234, lambda: copy(out))
    found = out.stat()
    assert (found.st_ino, found.st_uid, stat.S_IMODE(found.st_mode)) == (inode, 0, 0o777)
    assert tree(out) == CONTENT
    assert names_in(tmp_path) == ["out"]


def test_attributes_that_cannot_be_kept_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    os.setxattr(tmp_path / "out", "user.kept", b"as it was")

    monkeypatch.setattr(os, "setxattr", failing(errno.EPERM))
    sink = copy(tmp_path / "out")
    assert sink.notes == [f"{tmp_path / 'out'} could not keep its extended attributes"]


# -- in place ------------------------------------------------------------------------------------


def test_in_place_the_directory_itself_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o755)
    inode = out.stat().st_ino
    mounted = os.open(out, os.O_RDONLY)  # as a container has it
    top_names = sorted({name.split("/")[0] for name in CONTENT})
    try:
        for transfer_id in ("t1", "t2"):
            force = transfer_id == "t2"
            sink = finished(out, transfer_id=transfer_id, force=force, in_place=True)
            sink.publish()
            assert sorted(os.listdir(mounted)) == names_in(out) == top_names
        assert out.stat().st_ino == inode
        assert tree(out) == CONTENT
        assert "file by file, index files last" in sink.notes[0]
        assert "--in-place" in sink.notes[0]
    finally:
        os.close(mounted)


def test_in_place_into_nothing_is_one_step(tmp_path: Path) -> None:
    sink = finished(tmp_path / "out", in_place=True)
    sink.publish()
    assert tree(tmp_path / "out") == CONTENT
    assert sink.notes == []


# -- a disk that does not confirm ----------------------------------------------------------------


def not_confirming(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The disk fails to write this folder's names."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), folder.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("how", ["rename", "file by file", "parents"])
def test_a_name_that_is_not_confirmed_is_a_failure_of_a_complete_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    out = tmp_path / ("a/b/out" if how == "parents" else "out")
    in_place = how == "file by file"
    if in_place:
        out.mkdir()
    sink = finished(out, in_place=in_place)
    not_confirming(monkeypatch, out if in_place else tmp_path)
    with pytest.raises(DestinationError) as caught:
        sink.publish()
    assert caught.value.exit_code == 7
    assert caught.value.message == (
        f"{out} is complete, but may not survive a power cut: input/output error"
    )
    assert sink.published
    assert sink.result()["published"] is True
    assert tree(out) == CONTENT
    assert names_in(out.parent) == ["out"]


def test_an_exchange_that_is_not_confirmed_keeps_the_old_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tmp_path / "out", {"config.json": b"old"})
    sink = finished(tmp_path / "out", force=True, transfer_id="t2")
    not_confirming(monkeypatch, tmp_path)
    with pytest.raises(DestinationError, match="may not survive a power cut") as caught:
        sink.publish()
    assert str(tmp_path / ".out.packcast-t2") in caught.value.message
    assert tree(tmp_path / "out") == CONTENT
    assert tree(tmp_path / ".out.packcast-t2") == {"config.json": b"old"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_be_told_to_confirm_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    sink = finished(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", failing(code))
    sink.publish()
    assert sink.published
