"""What lies in a checkpoint directory: every file that is not hidden, and what its name says it is.

Looks at names, links and inodes only; opens no file and judges nothing but the walk's own bounds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from packcast.checkpoint.index import SHARD_SUFFIX, is_index
from packcast.checkpoint.reading import shown_name, unreadable
from packcast.errors import CheckpointError

MAX_ENTRIES = 100_000
ALL_MAY = 0o777  # what travels of a mode: never set-user-ID, set-group-ID or sticky

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class Kind(Enum):
    """What a file is by its name."""

    SHARD = "shard"
    INDEX = "index"
    SIDECAR = "sidecar"
    OTHER_WEIGHTS = "other weights"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file met on the walk; `found` is None where it is a dangling symlink.

    `path` has no symlink left in it, so that it can be opened without following one. `folder_mode`
    is what all folders on the way allow, from the checkpoint's own down to the file. A file that
    `is_outside` was reached by a symlink to outside of the checkpoint: it is not to be opened.
    """

    name: str
    path: Path
    kind: Kind
    found: os.stat_result | None
    folder_mode: int
    is_outside: bool = False


def kind_of(name: str) -> Kind:
    """What the file of this logical name is, by its name alone."""
    if name.endswith(SHARD_SUFFIX):
        return Kind.SHARD
    if is_index(name):
        return Kind.INDEX
    return Kind.OTHER_WEIGHTS if name.endswith(_OTHER_WEIGHTS) else Kind.SIDECAR


def leaves_out(glob: str, name: str) -> bool:
    """Whether the glob matches a file's logical name, or that of a folder it is in."""
    glob = glob.removeprefix("./").rstrip("/")
    while name:
        if fnmatchcase(name, glob):
            return True
        name = name.rpartition("/")[0]
    return False


def _homes_of(root: Path) -> tuple[Path, ...]:
    """The folders in which a link may end: the checkpoint, and the blobs of a Hugging Face cache
    if it is a snapshot there. No symlink is left in any of them."""
    snapshots = next((folder for folder in root.parents if folder.name == "snapshots"), None)
    return (root,) if snapshots is None else (root, snapshots.parent / "blobs")


def walk(
    root: Path, exclude_files: Sequence[str] = (), *, follow_links: bool = False
) -> tuple[list[Entry], list[str]]:
    """All files under `root` by logical name, nested folders too, and warnings.

    What a glob of `exclude_files` matches is as if it were not there. Symlinks are followed within
    the checkpoint and to the blobs of a Hugging Face cache, and elsewhere with `follow_links`; else
    a folder outside is left with a warning, and a file marked. A directory that is met again below
    itself is left with a warning; what then remains is bounded by MAX_ENTRIES, so that no knot of
    links keeps us for ever. Raises CheckpointError there, and where a directory cannot be read.
    """
    real = root.resolve()
    homes = _homes_of(real)
    entries: list[Entry] = []
    warnings: list[str] = []
    num_met = 0
    unused = dict.fromkeys(exclude_files)
    above: frozenset[tuple[int, int]] = frozenset()
    todo = [("", real, ALL_MAY, above)]
    while todo:
        prefix, directory, mode_above, above = todo.pop()
        status = _status(directory, prefix)
        identity, folder_mode = (status.st_dev, status.st_ino), status.st_mode & mode_above
        if identity in above:
            warnings.append(
                f"{shown_name(prefix[:-1])}: leads back to a directory above it: left out"
            )
            continue
        for file_name in _listing(directory, prefix):
            num_met += 1
            if num_met > MAX_ENTRIES:
                raise CheckpointError(
                    f"{root}: more than {MAX_ENTRIES} files: too many for a checkpoint",
                    hint="give the directory that holds the .safetensors files",
                )
            name, path = prefix + file_name, directory / file_name
            matching = [glob for glob in exclude_files if leaves_out(glob, name)]
            if matching:
                for glob in matching:
                    unused.pop(glob, None)
                continue
            found = _stat(path, name)
            is_outside = False
            if found is not None and path.is_symlink():
                path = path.resolve()
                is_outside = not follow_links and not any(map(path.is_relative_to, homes))
            if found is None or not stat.S_ISDIR(found.st_mode):
                entries.append(Entry(name, path, kind_of(name), found, folder_mode, is_outside))
            elif is_outside:
                warnings.append(outside(name, "left out"))
            else:
                todo.append((name + "/", path, folder_mode, above | {identity}))
    entries.sort(key=lambda entry: entry.name)
    warnings += [f"--exclude-files {shown_name(glob)}: matches no file" for glob in unused]
    return entries, sorted(warnings)


def outside(name: str, outcome: str) -> str:
    """What is to be said of a link that is not followed."""
    what = f"{shown_name(name)}: a symlink to outside of the checkpoint: {outcome}"
    return f"{what} (--follow-links follows it)"


def _status(directory: Path, prefix: str) -> os.stat_result:
    try:
        return os.stat(directory)
    except OSError as error:
        raise unreadable(shown_name(prefix or str(directory)), error) from error


def _listing(directory: Path, prefix: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise unreadable(shown_name(prefix or str(directory)), error) from error
    return [name for name in names if not name.startswith(".") and name != "__pycache__"]


def _stat(path: Path, name: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if path.is_symlink():
            return None
        raise unreadable(shown_name(name), error) from error
