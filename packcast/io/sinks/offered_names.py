"""The names of an offer where they become paths: whether they are safe, which folders they need.

Pure: touches no file system.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterable

from packcast.checkpoint.names import clash_of, name_fault
from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import DestinationError

_TRANSFER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_names(names: Collection[str], transfer_id: str) -> None:
    """Raise DestinationError unless these, and a name with the id, stay inside the target.

    The receiver has looked at them before; but here they are made.
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

    That is what the source's folder allows: `folder_mode` is no more, of a file anywhere in it.
    """
    modes = {"": 0}
    for spec in files:
        folder = spec.name
        while folder:
            folder = folder.rpartition("/")[0]
            modes[folder] = modes.get(folder, 0) | spec.folder_mode
    return {folder: modes[folder] | stat.S_IRWXU for folder in sorted(modes)}
