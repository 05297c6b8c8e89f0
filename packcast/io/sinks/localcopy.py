"""The local files to compare an offer with, by name and size.

Opens no file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from packcast.checkpoint.checkpoint import Checkpoint
from packcast.checkpoint.outgoing import FileSpec
from packcast.checkpoint.reading import FileState, unreadable
from packcast.checkpoint.sourcefile import SourceFile
from packcast.checkpoint.walk import Kind, walk
from packcast.errors import CheckpointError


def local_copy(path: Path, files: Sequence[FileSpec]) -> Checkpoint:
    """The offered files that exist at `path`, by name and size only.

    Headers are not parsed: a damaged copy must come out as different, not as unreadable. Other
    files there are listed too, except weights in other formats. Raises CheckpointError if there is
    no file.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise unreadable(str(path), error) from error
    if stat.S_ISREG(mode):
        return Checkpoint(path, (_local_file(path.name, path),), ())
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: there is nothing to compare with")
    offered = {spec.name for spec in files}
    beside: set[str] = set()
    with suppress(CheckpointError):  # too many to be a copy
        entries, _ = walk(path)
        beside = {it.name for it in entries if it.kind is not Kind.OTHER_WEIGHTS}
    found_files = (
        _local_file(name, path / name)
        for name in sorted(offered | beside)
        if (path / name).is_file()
    )
    return Checkpoint(path, tuple(found_files), ())


def _local_file(name: str, path: Path) -> SourceFile:
    real = path.resolve()
    status = real.stat()
    return SourceFile(
        name=name,
        path=real,
        state=FileState.of(status),
        mode=0,
        folder_mode=0,
        header=None,
    )


def counterparts(local: Checkpoint, files: Sequence[FileSpec]) -> tuple[SourceFile | None, ...]:
    """The local file for each offered one: by name, but one single file stands for another."""
    if len(files) == 1 and len(local.files) == 1 and local.path.is_file():
        return (local.files[0],)
    by_name = {file.name: file for file in local.files}
    return tuple(by_name.get(spec.name) for spec in files)


def check_unchanged(local: SourceFile, found: os.stat_result) -> None:
    difference = local.state.difference(found)
    if difference:
        raise CheckpointError(
            f"{local.path} changed while it was being compared: {difference}", hint="run it again"
        )
