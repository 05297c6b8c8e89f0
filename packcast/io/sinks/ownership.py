"""Which files a copy may replace: those of the offer, and those marked as packcast's own.

Knows directories by descriptor and names; moves nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from packcast.checkpoint.names import MAX_DEPTH

MARK = "user.packcast"
STAGE_PREFIX = ".packcast-"  # a partial directory inside its target; see target.py
RECORD = ".packcast-owner"  # in a partial directory: who made it; see record.py

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_folder(root_fd: int, folder: str) -> int:
    """A folder below `root_fd`, opened component by component so that no symlink is followed."""
    fd = os.dup(root_fd)
    for component in folder.split("/") if folder else ():
        try:
            below = os.open(component, _FOLDER_FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


@contextmanager
def folder_open(root_fd: int, folder: str) -> Iterator[int]:
    """The descriptor of `open_folder` for the length of a with block."""
    fd = open_folder(root_fd, folder)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def path_open(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The descriptor of a directory for the length of a with block; symlinks are followed."""
    fd = os.open(path, flags | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def mark_as_own(fd: int, transfer_id: str) -> None:
    """Record on a finished file that packcast wrote it, and when it was so; where xattrs exist.

    The times are read back first: a file system may keep fewer digits than were set.
    """
    is_now = os.fstat(fd)
    text = f"1 {transfer_id} {is_now.st_size} {is_now.st_mtime_ns}"
    with suppress(OSError):
        os.setxattr(fd, MARK, text.encode("ascii"))


def _is_unchanged_copy(dir_fd: int, name: str) -> bool:
    # O_NONBLOCK: should the name have become a FIFO meanwhile, opening it must not wait.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name, flags, dir_fd=dir_fd)
    except OSError:
        return False
    try:
        is_now = os.fstat(fd)
        words = os.getxattr(fd, MARK).split()
        return words[2:] == [b"%d" % is_now.st_size, b"%d" % is_now.st_mtime_ns]
    except OSError:
        return False
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class FolderEntry:
    """Something below a directory that --force would replace."""

    name: str  # relative to that directory, with `/`
    is_folder: bool
    is_foreign: bool


def entries(
    root_fd: int, offered: Collection[str], ignore: Callable[[str, bool], bool]
) -> Iterator[FolderEntry]:
    """Everything below `root_fd`, folders after their content; symlinks are not followed.

    `ignore(name, is_folder)` decides at the top level. Files that an interrupted copy staged inside
    the target (`.packcast-*`) count as if they were in the target itself.
    """
    folders = {name[:at] for name in offered for at, char in enumerate(name) if char == "/"}

    def walk(dir_fd: int, prefix: str, depth: int) -> Iterator[FolderEntry]:
        with os.scandir(dir_fd) as listing:
            found = sorted(listing, key=lambda entry: entry.name)
        for entry in found:
            name = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if depth == 0 and ignore(entry.name, is_folder):
                continue
            judged = name.partition("/")[2] if name.startswith(STAGE_PREFIX) else name
            if not is_folder:
                is_own = entry.is_file(follow_symlinks=False) and (
                    judged in offered
                    or (judged == RECORD and judged != name)
                    or _is_unchanged_copy(dir_fd, entry.name)
                )
                yield FolderEntry(name, False, not is_own)
                continue
            if depth > MAX_DEPTH:
                yield FolderEntry(name, True, True)
                continue
            is_empty = True
            with folder_open(dir_fd, entry.name) as below_fd:
                for below in walk(below_fd, name + "/", depth + 1):
                    is_empty = False
                    yield below
            # An empty folder of another name is foreign: packcast makes none.
            yield FolderEntry(name, True, is_empty and judged not in folders and judged != "")

    yield from walk(root_fd, "", 0)


def remove_entry(root_fd: int, name: str, *, is_folder: bool) -> None:
    """Remove one file, or one folder if it is empty by now; what is not there is fine."""
    folder, _, last = name.rpartition("/")
    with suppress(FileNotFoundError), folder_open(root_fd, folder) as fd:
        try:
            (os.rmdir if is_folder else os.unlink)(last, dir_fd=fd)
        except OSError as error:
            if not (is_folder and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                raise
