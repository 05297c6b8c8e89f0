"""Room for a copy, before any byte moves: reserved by the file system, or at least compared.

Knows descriptors and sizes; writes nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import DestinationError
from packcast.io import syscalls
from packcast.io.files import FileTable
from packcast.io.sinks.partial import partials_in
from packcast.io.sinks.target import Target, destination_error
from packcast.units import format_size

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def free_nbytes(fd: int) -> int | None:
    """What an ordinary user may still write there; None where the file system does not say."""
    room = os.fstatvfs(fd)
    # Some network and user-space file systems report nothing at all.
    return room.f_bavail * room.f_frsize if room.f_blocks else None


def reserve(
    table: FileTable, files: Sequence[FileSpec], target: Target, free: int | None
) -> list[str]:
    """Reserve every file's bytes; `free` was the room before the first of them was made.

    Returns the promises not kept; raises DestinationError with the sizes needed and free, and
    TransferError where an abort came in between.
    """
    for index, spec in enumerate(files):
        if not spec.nbytes:
            continue
        try:
            with table.borrow(index) as fd:
                syscalls.fallocate(fd, spec.nbytes)
        except OSError as error:
            if error.errno in _CANNOT_RESERVE:
                break
            if error.errno in _NO_ROOM:
                raise _no_room(error, files, target, free) from error
            path = os.path.join(target.path, spec.name)
            raise destination_error(error, f"reserve {path}") from error
    else:
        return []
    if free is not None and free < sum(spec.nbytes for spec in files):
        raise _no_room(OSError(errno.ENOSPC, "no space"), files, target, free)
    return [f"{target.path}: free space was compared only, since it cannot be reserved here"]


def _no_room(
    error: OSError, files: Sequence[FileSpec], target: Target, free: int | None
) -> DestinationError:
    sizes = f"{format_size(sum(spec.nbytes for spec in files))} needed"
    sizes += "" if free is None else f", {format_size(free)} free"
    failure = destination_error(error, f"write {target.path} ({sizes})")
    # A process that was killed could not clean up; its partial directory is hidden, and large.
    left = [
        partial for partial in partials_in(target.holder) if partial.path != target.partial_path
    ]
    largest = max(left, key=lambda partial: partial.nbytes, default=None)
    if largest:
        failure.hint = f"{largest}; `packcast clean {target.holder}` lists what was left behind"
    return failure
