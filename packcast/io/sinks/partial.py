"""Partial directories: which of them nobody uses any more, by their records, and their removal.

Knows directories and names; not what is in the copies.
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

from packcast.io.sinks.ownership import RECORD, STAGE_PREFIX
from packcast.io.sinks.record import State, look
from packcast.units import format_size

_NAME = re.compile(r"\.(?:.+\.)?packcast-[A-Za-z0-9_-]{1,64}")
_MAX_NAME_NBYTES = 255
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Partial:
    """A partial directory that was found; `owner` is who made it, as far as that is recorded."""

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
    """What a target's partial directory is called beside it."""
    beside = f".{name}.packcast-{transfer_id}"
    if len(os.fsencode(beside)) > _MAX_NAME_NBYTES:
        beside = f"{STAGE_PREFIX}{transfer_id}-{_digest(name)}"
    return beside


def partials_of(target: str) -> list[Partial]:
    """All partial directories of a target, beside it and inside it."""
    holder, name = os.path.split(target)
    beside = _named_in(holder, lambda found: _belongs(found, name))
    return [*beside, *_named_in(target, lambda found: found.startswith(STAGE_PREFIX))]


def partials_in(folder: str) -> list[Partial]:
    """All partial directories that lie in a folder, whatever their targets."""
    return _named_in(folder, lambda _found: True)


def remove_if_unused(partial: Partial) -> bool:
    """Remove a partial directory that still proves to be unused; True if it is gone."""
    try:
        holder_fd = os.open(os.path.dirname(partial.path), _FOLDER_FLAGS)
    except OSError:
        return False
    name = os.path.basename(partial.path)
    try:
        with suppress(OSError):
            folder_fd = os.open(name, _FOLDER_FLAGS, dir_fd=holder_fd)
            try:
                record_fd, state, _ = look(folder_fd)
                try:
                    if state == "unused":  # the lock is ours, so nobody else removes it
                        remove_partial(holder_fd, name)
                finally:
                    if record_fd >= 0:
                        os.close(record_fd)
                if state == "unused":
                    _remove_emptied(holder_fd, name)
            finally:
                os.close(folder_fd)
        return not is_there(holder_fd, name)
    finally:
        os.close(holder_fd)


def remove_partial(holder_fd: int, name: str) -> None:
    """Remove a partial directory, its record last: a removal that is cut off can be gone on with.

    Never raises; `is_there` tells how it went.
    """
    with suppress(OSError):
        folder_fd = os.open(name, _FOLDER_FLAGS, dir_fd=holder_fd)
        try:
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
        finally:
            os.close(folder_fd)
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
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        names = sorted(name for name in os.listdir(folder_fd) if _NAME.fullmatch(name))
        found = [_found(folder, folder_fd, name) for name in names if wanted(name)]
    finally:
        os.close(folder_fd)
    return [partial for partial in found if partial is not None]


def _belongs(found: str, name: str) -> bool:
    ours = f".{name}.packcast-"
    shortened = found.startswith(STAGE_PREFIX) and found.endswith(f"-{_digest(name)}")
    return shortened or (found.startswith(ours) and "." not in found[len(ours) :])


def _digest(name: str) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()


def _found(folder: str, holder_fd: int, name: str) -> Partial | None:
    try:
        folder_fd = os.open(name, _FOLDER_FLAGS, dir_fd=holder_fd)
    except OSError:
        return None  # gone meanwhile, or no directory
    try:
        record_fd, state, owner = look(folder_fd)
        if record_fd >= 0:
            os.close(record_fd)
        return Partial(os.path.join(folder, name), state, owner, _nbytes_below(folder_fd))
    finally:
        os.close(folder_fd)


def _nbytes_below(folder_fd: int) -> int:
    """What the files below take on the disk."""
    total = 0
    with suppress(OSError):
        for _, _, files, dir_fd in os.fwalk(dir_fd=folder_fd):
            for name in files:
                with suppress(OSError):
                    total += os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_blocks * 512
    return total
