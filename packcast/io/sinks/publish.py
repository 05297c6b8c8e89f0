"""Publishing: a complete copy gets its final name, in one step where possible.

Knows directories and names only.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress

from packcast.checkpoint.walk import ALL_MAY
from packcast.errors import DestinationError
from packcast.io.sinks.ownership import entries, folder_open, path_open, remove_entry
from packcast.io.sinks.record import give_up_claim
from packcast.io.sinks.target import Target, check_replaceable, destination_error
from packcast.io.syscalls import exchange

# No rename or exchange here (a mount, overlayfs, NFS, a sticky directory): go file by file.
_NO_SINGLE_STEP = frozenset(
    {errno.EXDEV, errno.EBUSY, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
    | {errno.EPERM, errno.EACCES}
)
_NOT_EMPTY = frozenset({errno.ENOTEMPTY, errno.EEXIST})


class NotDurable(DestinationError):
    """The copy is complete and has its final name, but the disk did not confirm that."""

    def __init__(self, target: Target, error: OSError, more: str = "") -> None:
        reason = (error.strerror or str(error)).lower()
        super().__init__(
            f"{target.path} is complete, but may not survive a power cut: {reason}{more}",
            hint="fsync failed: check the disk for errors, then send again with --force",
        )


def seal(target: Target, partial_fd: int, claim_fd: int) -> None:
    """From now on the partial directory is a complete copy, and nothing but that."""
    try:
        give_up_claim(partial_fd, claim_fd)
        if target.mode is not None:
            os.fchmod(partial_fd, target.mode)
    except OSError as error:
        raise destination_error(error, f"publish {target.path}") from error


def publish(target: Target, holder_fd: int, offered: Collection[str], *, force: bool) -> list[str]:
    """Give the complete partial directory its final name, durably; returns warnings.

    Raises NotDurable if the new name exists but may not survive a power cut. Any other failure
    (DestinationError) keeps the partial directory, a verified copy, and names it.
    """
    try:
        if target.inside:
            check_replaceable(target, offered, force=force)
            return _file_by_file(target, holder_fd, holder_fd, offered, target.inside_because or "")
        return _in_one_step(target, holder_fd, offered, force)
    except NotDurable:
        raise
    except OSError as error:
        failure = destination_error(error, f"publish {target.path}")
    except DestinationError as error:
        failure = error
    kept = f"the complete copy is kept in {target.partial_path}: move it into place yourself"
    raise DestinationError(failure.message, hint=kept) from failure


def _in_one_step(
    target: Target, holder_fd: int, offered: Collection[str], force: bool
) -> list[str]:
    name = os.path.basename(target.path)
    try:
        # A plain rename is enough: onto a directory it succeeds only where that is empty, and onto
        # anything else never, so nothing is lost whatever has appeared there since.
        os.rename(target.partial, name, src_dir_fd=holder_fd, dst_dir_fd=holder_fd)
    except OSError as error:
        if error.errno not in _NOT_EMPTY | _NO_SINGLE_STEP or not os.path.isdir(target.path):
            raise
        is_empty = error.errno not in _NOT_EMPTY
        reason = (error.strerror or "").lower()
    else:
        _make_durable(target, holder_fd)
        return []
    check_replaceable(target, offered, force=force)
    if not is_empty:
        try:
            exchange(holder_fd, target.partial, name)
        except OSError as error:
            if error.errno not in _NO_SINGLE_STEP:
                raise
            reason = (error.strerror or "").lower()
        else:
            # Until the exchange is durable a power cut may bring the old directory back.
            old = f"; the old copy is kept in {target.partial_path}"
            _make_durable(target, holder_fd, more=old)
            return _remove_old(target, holder_fd, offered)
    with path_open(target.path, os.O_NOFOLLOW) as target_fd:
        because = f"it cannot be replaced in one step ({reason})"
        return _file_by_file(target, holder_fd, target_fd, offered, because)


def _make_durable(target: Target, holder_fd: int, *, more: str = "") -> None:
    # The new name is out by now, so a failure here is no reason to call it unpublished.
    try:
        sync_folder(holder_fd, "")
    except OSError as error:
        raise NotDurable(target, error, more) from error


def _remove_old(target: Target, holder_fd: int, offered: Collection[str]) -> list[str]:
    """Remove the old copy, which the exchange moved to the partial directory's name.

    Files that others have put there since the last check are kept.
    """
    try:
        with folder_open(holder_fd, target.partial) as old_fd:
            for entry in entries(old_fd, offered, lambda _name, _is_folder: False):
                if not entry.is_foreign:
                    remove_entry(old_fd, entry.name, is_folder=entry.is_folder)
        os.rmdir(target.partial, dir_fd=holder_fd)
    except OSError:
        return [f"the old {target.path} could not be removed completely: see {target.partial_path}"]
    return []


def _file_by_file(
    target: Target, holder_fd: int, into_fd: int, offered: Collection[str], because: str
) -> list[str]:
    """Move the files into the directory that is there, index files last and their old ones first.

    So a directory in between has no index that names a mixture of old and new shards.
    """
    for entry in entries(into_fd, offered, target.ignores):
        is_stale = entry.is_folder or entry.name not in offered or _is_index(entry.name)
        if is_stale and not entry.is_foreign:
            remove_entry(into_fd, entry.name, is_folder=entry.is_folder)
    fault: OSError | None = None
    with folder_open(holder_fd, target.partial) as partial_fd:
        for is_index in (False, True):
            names = sorted(name for name in offered if _is_index(name) is is_index)
            for name in names:
                _move(partial_fd, into_fd, name)
            for folder in sorted({name.rpartition("/")[0] for name in names} | {""}):
                try:
                    sync_folder(into_fd, folder)
                except OSError as error:
                    fault = fault or error
    # Only empty folders are left in it.
    shutil.rmtree(target.partial, ignore_errors=True, dir_fd=holder_fd)
    if fault is not None:
        raise NotDurable(target, fault)
    return [f"{target.path} was published file by file, index files last: {because}"]


def _is_index(name: str) -> bool:
    return name.endswith(".index.json")


def _move(from_fd: int, into_fd: int, name: str) -> None:
    folder, _, last = name.rpartition("/")
    components = folder.split("/") if folder else []
    for depth in range(len(components)):
        here = "/".join(components[: depth + 1])
        mode = os.stat(here, dir_fd=from_fd, follow_symlinks=False).st_mode & ALL_MAY
        above = "/".join(components[:depth])
        with folder_open(into_fd, above) as above_fd, suppress(FileExistsError):
            os.mkdir(components[depth], mode, dir_fd=above_fd)
    with folder_open(from_fd, folder) as source_fd, folder_open(into_fd, folder) as dest_fd:
        os.rename(last, last, src_dir_fd=source_fd, dst_dir_fd=dest_fd)


def sync_folder(root_fd: int, folder: str) -> None:
    """Make a folder's names durable, if its file system supports that."""
    with folder_open(root_fd, folder) as fd:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise


def sync_parents_of(folders: Sequence[str], target: Target) -> None:
    """Make the names of folders that were made on the way durable; raises NotDurable."""
    try:
        for folder in folders:
            with path_open(os.path.dirname(folder)) as fd:
                sync_folder(fd, "")
    except PermissionError:
        return  # a parent that may be written but not read cannot be synced
    except OSError as error:
        raise NotDurable(target, error) from error
