"""Lists a checkpoint directory: every file that is not hidden, and its kind by its name.

Looks at names, links and inodes only; opens no file.
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
from packcast.checkpoint.reading import os_errors, shown_name, unreadable
from packcast.errors import CheckpointError

MAX_ENTRIES = 100_000
ALL_MAY = 0o777  # the bits of a mode that are sent: not set-user-ID, set-group-ID or sticky

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class Kind(Enum):
    """What a file is by its name."""

    SHARD = "shard"
    INDEX = "index"
    SIDECAR = "sidecar"
    OTHER_WEIGHTS = "other weights"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the directory; `found` is None for a dangling symlink.

    `path` has no symlink in it. `folder_mode` are the permission bits that all folders have, from
    the checkpoint's down to the file's. A file that `is_outside` was reached by a symlink that
    leaves the checkpoint: it must not be opened.
    """

    name: str
    path: Path
    kind: Kind
    found: os.stat_result | None
    folder_mode: int
    is_outside: bool = False


def kind_of(name: str) -> Kind:
    """The kind of a file by its logical name."""
    if name.endswith(SHARD_SUFFIX):
        return Kind.SHARD
    if is_index(name):
        return Kind.INDEX
    return Kind.OTHER_WEIGHTS if name.endswith(_OTHER_WEIGHTS) else Kind.SIDECAR


def leaves_out(glob: str, name: str) -> bool:
    """Whether the glob matches a file's logical name or one of its folders."""
    glob = glob.removeprefix("./").rstrip("/")
    while name:
        if fnmatchcase(name, glob):
            return True
        name = name.rpartition("/")[0]
    return False


def _homes_of(root: Path) -> tuple[Path, ...]:
    """The folders that links may lead to: the checkpoint, and the blobs of the Hugging Face cache
    if it is a snapshot there."""
    snapshots = next((folder for folder in root.parents if folder.name == "snapshots"), None)
    return (root,) if snapshots is None else (root, snapshots.parent / "blobs")


def walk(
    root: Path, exclude_files: Sequence[str] = (), *, follow_links: bool = False
) -> tuple[list[Entry], list[str]]:
    """All files under `root` and its folders, by logical name, and warnings.

    Files that a glob of `exclude_files` matches are ignored. Symlinks are followed within the
    checkpoint and to the blobs of a Hugging Face cache, and elsewhere only with `follow_links`;
    otherwise a folder outside is left out with a warning, and a file is marked. So is a directory
    that leads back to one above it. Raises CheckpointError for more than MAX_ENTRIES files (links
    can multiply directories), and where a directory cannot be read.
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
        with os_errors(shown_name(prefix or str(directory))):
            status, names = os.stat(directory), os.listdir(directory)
        identity, folder_mode = (status.st_dev, status.st_ino), status.st_mode & mode_above
        if identity in above:
            warnings.append(
                f"{shown_name(prefix[:-1])}: leads back to a directory above it: left out"
            )
            continue
        for file_name in names:
            if file_name.startswith(".") or file_name == "__pycache__":
                continue
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
    """The warning for a link that is not followed."""
    what = f"{shown_name(name)}: a symlink to outside of the checkpoint: {outcome}"
    return f"{what} (--follow-links follows it)"


def _stat(path: Path, name: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if path.is_symlink():
            return None
        raise unreadable(shown_name(name), error) from error
