"""Where a received copy goes: the target, and the partial directory beside it or inside it.

Knows paths and why one cannot be written; creates nothing but parents, and moves nothing.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from packcast.checkpoint.names import clash_of, name_fault
from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import DestinationError
from packcast.io.sinks.attributes import can_give_owner
from packcast.io.sinks.ownership import STAGE_PREFIX, entries, path_open
from packcast.io.sinks.partial import name_beside, partials_of, remove_if_unused
from packcast.io.syscalls import mount_id

_TRANSFER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NUM_FOREIGN_NAMED = 3
_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "a symbolic link is in the way",
    errno.EFBIG: "the file is larger than the file system or a limit allows",
}
_HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another --out")
_HINTS |= dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "check the permissions, or choose another --out"
)


@dataclass(frozen=True, slots=True)
class Target:
    """The target and its partial directory, named after the transfer: `partial` in `holder`."""

    path: str  # absolute, symlinks resolved
    holder: str
    partial: str
    mode: int | None  # of a directory that is there already, and that a new one will replace
    inside_because: str | None  # the reason why `holder` is the target itself

    @property
    def inside(self) -> bool:
        return self.inside_because is not None

    @property
    def partial_path(self) -> str:
        return os.path.join(self.holder, self.partial)

    def ignores(self, name: str, is_folder: bool) -> bool:
        """What does not count as the target's content: our own stage, a fresh disk's lost+found."""
        return is_folder and (
            name == self.partial or (name == "lost+found" and os.path.ismount(self.path))
        )


def destination_error(error: OSError, doing: str) -> DestinationError:
    """One sentence for what the kernel said; `doing` as in `cannot <doing>`."""
    reason = _REASONS.get(error.errno or 0) or (error.strerror or str(error)).lower()
    hint = _HINTS.get(error.errno or 0)
    return DestinationError(f"cannot {doing}: {reason}", hint=hint)


def check_names(names: Collection[str], transfer_id: str) -> None:
    """Raise DestinationError unless these, and a name with the id, stay inside the target.

    The receiver has checked them already; this is where they become paths.
    """
    if not _TRANSFER_ID.fullmatch(transfer_id):
        raise DestinationError(f"{transfer_id!r} is not an id of a transfer")
    for name in names:
        fault = name_fault(name)
        if fault:
            raise DestinationError(f"the offered name {name!r} {fault}")
    clash = clash_of(names)
    if clash:
        raise DestinationError(f"the offered names {clash[0]!r} and {clash[1]!r} clash")


def folder_modes(files: Iterable[FileSpec]) -> dict[str, int]:
    """Every folder that the files need, parents first and "" for the copy itself, with its mode.

    A folder's mode is the union of its files' `folder_mode`, and no more than the source allows.
    """
    modes = {"": 0}
    for spec in files:
        folder = spec.name
        while folder:
            folder = folder.rpartition("/")[0]
            modes[folder] = modes.get(folder, 0) | spec.folder_mode
    return {folder: modes[folder] | stat.S_IRWXU for folder in sorted(modes)}


def locate(target: Path, transfer_id: str, *, in_place: bool = False) -> Target:
    """Resolve `target` and decide where its partial directory goes; raises DestinationError.

    A target that is a symlink is refused, since somebody else may have put it there; one further up
    is part of the path. The partial directory lies beside the target, so that one rename publishes
    all; inside it where no such rename is possible, or where the directory that is there is to stay
    (`in_place`).
    """
    try:
        real = os.path.realpath(target)
        if os.path.islink(target):
            raise DestinationError(
                f"{target} is a symbolic link, which is not followed",
                hint=f"to write into its target, give --out {real}",
            )
        found = os.lstat(real)
    except FileNotFoundError:
        if not os.path.isabs(target) and not os.path.exists(os.curdir):
            raise DestinationError(f"{target}: the current directory no longer exists") from None
        found = None
    except NotADirectoryError:
        raise _blocked_by_a_file(real) from None
    except OSError as error:
        raise destination_error(error, f"write {target}") from error
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise DestinationError(f"{target} is not a directory", hint="--out names a directory")
    holder, name = os.path.split(real)
    reason = None
    if found is not None:
        asked = "the directory stays, as --in-place asks" if in_place else None
        reason = asked or _reason_to_stage_inside(real, holder, found)
    if reason is not None:
        return Target(real, real, f"{STAGE_PREFIX}{transfer_id}", None, reason)
    mode = None if found is None else stat.S_IMODE(found.st_mode)
    return Target(real, holder, name_beside(name, transfer_id), mode, None)


def _reason_to_stage_inside(real: str, holder: str, found: os.stat_result) -> str | None:
    with suppress(OSError):
        if os.path.samestat(found, os.stat(os.curdir)):
            return "it is the current directory"
    try:
        above = os.stat(holder)
        if real == holder or above.st_dev != found.st_dev or _mount(real) != _mount(holder):
            return "it is a mount point"
    except OSError as error:
        raise destination_error(error, f"write {real}") from error
    if not os.access(holder, os.W_OK | os.X_OK) and os.access(real, os.W_OK | os.X_OK):
        return f"{holder} is not writable"
    if not can_give_owner(found):
        return "a new directory could not have its owner and group"
    return None


def _mount(path: str) -> int | None:
    with path_open(path, os.O_PATH) as fd:
        return mount_id(fd)


def _blocked_by_a_file(path: str) -> DestinationError:
    above = os.path.dirname(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    return DestinationError(
        f"cannot create {path}: {above} is not a directory", hint="choose another --out"
    )


def clear_leftovers(target: Target) -> list[str]:
    """Remove the unused partial directories of this target; returns notes.

    A note names one that may be in use. Inside the target, where its files would mix with ours, it
    is a DestinationError.
    """
    notes = []
    for partial in partials_of(target.path):
        if os.path.basename(partial.path) == target.partial:
            continue
        if partial.state == "unused" and remove_if_unused(partial):
            notes.append(f"{partial}: removed")
        elif not os.path.lexists(partial.path):
            continue  # another rank was faster
        elif partial.owner is not None and os.path.dirname(partial.path) == target.path:
            raise DestinationError(
                f"another transfer is writing into {target.path}: {partial}",
                hint=f"if that transfer is over, remove {partial.path}",
            )
        elif partial.state == "used":
            notes.append(str(partial))
        else:
            notes.append(f"{partial}: if that transfer is over, remove it")
    return notes


def check_replaceable(target: Target, offered: Collection[str], *, force: bool) -> bool:
    """Whether the target has content to replace; raises DestinationError if that is not allowed.

    False if it does not exist or is empty.
    """
    try:
        with path_open(target.path) as fd:
            content = entries(fd, offered, target.ignores)
            first = next(content, None)
            if first is None:
                return False
            if not force:
                raise DestinationError(
                    f"{target.path} exists and is not empty",
                    hint="replace it with --force, or choose another --out",
                )
            names = (entry.name for entry in chain([first], content) if entry.is_foreign)
            foreign = list(islice(names, _NUM_FOREIGN_NAMED + 1))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(target.path):
            return False
        raise destination_error(error, f"look into {target.path}") from error
    if foreign:
        named = ", ".join(foreign[:_NUM_FOREIGN_NAMED])
        named += " and more" if len(foreign) > _NUM_FOREIGN_NAMED else ""
        raise DestinationError(
            f"{target.path} contains what packcast did not write: {named}",
            hint="--force replaces only copies; move this away, or choose another --out",
        )
    if not os.access(target.path, os.W_OK | os.X_OK):
        raise DestinationError(f"cannot replace {target.path}: permission denied")
    return True


def make_parents(
    path: str, made: list[str], while_wanted: Callable[[], AbstractContextManager[None]]
) -> None:
    """Make `path` and what is missing above it, adding to `made` what this call itself made."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        above = os.path.dirname(path)
        if above == path:
            break
        path = above
    for folder in reversed(missing):
        with while_wanted():
            try:
                os.mkdir(folder)
            except FileExistsError:
                # Another rank was faster, which is as good; or it is a file.
                if not os.path.isdir(folder):
                    raise _blocked_by_a_file(os.path.join(folder, "_")) from None
            except NotADirectoryError:
                raise _blocked_by_a_file(folder) from None
            except OSError as error:
                raise destination_error(error, f"make {folder}") from error
            else:
                made.append(folder)
