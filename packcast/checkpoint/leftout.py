"""The files of a checkpoint directory that are not sent, each with the reason. For display only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.names import name_fault
from packcast.checkpoint.walk import Kind, kind_of, leaves_out

MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file, or a folder with all that is in it (its name ends in a slash)."""

    name: str
    reason: str


def left_out(
    root: Path, sent: AbstractSet[str], *, sidecars: bool = True, exclude_files: Sequence[str] = ()
) -> list[LeftOut]:
    """The files of a directory that `sent` does not name; at most MAX_LISTED."""
    found: list[LeftOut] = []
    for folder, folders, files in os.walk(root):
        prefix = "" if folder == str(root) else os.path.relpath(folder, root) + "/"
        for name in sorted(folders):
            reason = _of_folder(Path(folder) / name, prefix + name, exclude_files)
            if reason:
                folders.remove(name)
                found.append(LeftOut(f"{prefix}{name}/", reason))
        found += [
            LeftOut(name, _of_file(name, sidecars=sidecars, exclude_files=exclude_files))
            for name in (prefix + file for file in sorted(files))
            if name not in sent
        ]
        if len(found) >= MAX_LISTED:
            break
    return found[:MAX_LISTED]


def _of_folder(path: Path, name: str, exclude_files: Sequence[str]) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.name == "__pycache__":
        return "a Python cache"
    if any(leaves_out(glob, name) for glob in exclude_files):
        return "--exclude-files"
    try:
        return None if any(path.iterdir()) else "an empty folder"
    except OSError:
        return "unreadable"


def _of_file(name: str, *, sidecars: bool, exclude_files: Sequence[str]) -> str:
    if name.rpartition("/")[2].startswith("."):
        return "hidden"
    if any(leaves_out(glob, name) for glob in exclude_files):
        return "--exclude-files"
    fault = name_fault(name)
    if fault:
        return f"its name {fault}"
    match kind_of(name):
        case Kind.OTHER_WEIGHTS:
            return "weights in another format"
        case Kind.SHARD:
            return "not in the index, or all its tensors are left out"
        case Kind.SIDECAR if not sidecars:
            return "--no-sidecars"
    return "a symlink to outside of it, no regular file, or a name that clashes with another"
