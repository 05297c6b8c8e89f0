"""Partial directories: which are unused, by their records, and their removal.

Knows directories and names only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from packcast.io.sinks.ownership import RECORD, STAGE_PREFIX, folder_open, path_open
from packcast.io.sinks.record import State, look
from packcast.units import format_size

_NAME = re.compile(r"\.(?:.+\.)?packcast-[A-Za-z0-9_-]{1,64}")
_MAX_NAME_NBYTES = 255


@dataclass(frozen=True, slots=True)
class Partial:
    """A partial directory on disk; `owner` is the process that made it, if that is recorded."""

    path: str
    state: State
    owner: str | None
    nbytes: int

    def __str__(self) -> str:
        size = format_size(self.nbytes)
        if self.owner is None:
            return f"{self.path} ({size}) has no record of who made it"
        verb = {"unused": "was left behind by", "used": "is in use by", "unknown": "is of"}
        return f"{self.path} ({size}) {verb[self.state]} {self.owner}"


def name_beside(name: str, transfer_id: str) -> str:
    """The name of a target's partial directory beside it."""
    beside = f".{name}.packcast-{transfer_id}"
    if len(os.fsencode(beside)) > _MAX_NAME_NBYTES:
        beside = f"{STAGE_PREFIX}{transfer_id}-{_digest(name)}"
    return beside


def partials_of(target: str) -> list[Partial]:
    """All partial directories of a target, beside it and inside it."""
    holder, name = os.path.split(target)
    beside = _named_in(holder, lambda entry: _belongs(entry, name))
    return [*beside, *_named_in(target, lambda entry: entry.startswith(STAGE_PREFIX))]


def partials_in(folder: str) -> list[Partial]:
    """All partial directories that lie in a folder, whatever their targets."""
    return _named_in(folder, lambda _entry: True)


def remove_if_unused(partial: Partial) -> bool:
    """Remove a partial directory if it is still unused; True if it is gone."""
    holder, name = os.path.split(partial.path)
    with suppress(OSError), path_open(holder, os.O_NOFOLLOW) as holder_fd:
        with suppress(OSError), folder_open(holder_fd, name) as folder_fd:
            with look(folder_fd) as (state, _):
                if state == "unused":  # we hold the lock, so no other process removes it
                    remove_partial(holder_fd, name)
            if state == "unused":
                _remove_emptied(holder_fd, name)  # on NFS only after the record is closed
        return not is_there(holder_fd, name)
    return False


def remove_partial(holder_fd: int, name: str) -> None:
    """Remove a partial directory, its record last, so that an interrupted removal can be resumed.

    Never raises; `is_there` returns whether it is still there.
    """
    with suppress(OSError), folder_open(holder_fd, name) as folder_fd:
        os.fchmod(folder_fd, 0o700)
        for entry in os.listdir(folder_fd):
            if entry == RECORD:
                continue
            if _is_folder(folder_fd, entry):
                shutil.rmtree(entry, ignore_errors=True, dir_fd=folder_fd)
            else:
                with suppress(OSError):
                    os.unlink(entry, dir_fd=folder_fd)
        if set(os.listdir(folder_fd)) <= {RECORD}:
            with suppress(FileNotFoundError):
                os.unlink(RECORD, dir_fd=folder_fd)
    _remove_emptied(holder_fd, name)


def _remove_emptied(holder_fd: int, name: str) -> None:
    with suppress(OSError):
        os.rmdir(name, dir_fd=holder_fd)


def _is_folder(dir_fd: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def is_there(holder_fd: int, name: str) -> bool:
    """Whether the holder has anything of that name."""
    try:
        os.stat(name, dir_fd=holder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _named_in(folder: str, wanted: Callable[[str], bool]) -> list[Partial]:
    partials = []
    with suppress(OSError), path_open(folder) as holder_fd:
        for name in sorted(filter(wanted, filter(_NAME.fullmatch, os.listdir(holder_fd)))):
            with suppress(OSError), folder_open(holder_fd, name) as fd, look(fd) as (state, owner):
                path = os.path.join(folder, name)
                partials.append(Partial(path, state, owner, _nbytes_below(fd)))
    return partials


def _belongs(entry: str, name: str) -> bool:
    ours = f".{name}.packcast-"
    shortened = entry.startswith(STAGE_PREFIX) and entry.endswith(f"-{_digest(name)}")
    return shortened or (entry.startswith(ours) and "." not in entry[len(ours) :])


def _digest(name: str) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()


def _nbytes_below(folder_fd: int) -> int:
    """Bytes of the files below, on disk."""
    total = 0
    with suppress(OSError):
        for _, _, files, dir_fd in os.fwalk(dir_fd=folder_fd):
            for name in files:
                with suppress(OSError):
                    total += os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_blocks * 512
    return total
