"""One file of a checkpoint: what is known of it once it was opened, and whether it is still so.

Reads a shard's header, never a tensor's bytes; knows nothing of the files beside it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.header import Header, header_of
from packcast.checkpoint.header_limits import HeaderLimits
from packcast.checkpoint.reading import FileState, open_regular
from packcast.checkpoint.walk import ALL_MAY
from packcast.errors import CheckpointError

MAX_MTIME_NS = (1 << 63) - 1  # in 2262; an offer has no later time


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read. `name` is logical (posix, relative), `path` has no symlink left in it.

    `state` is as when the checkpoint was opened; `mode` are the file's permission bits, and
    `folder_mode` those that all folders have that it is in. `header` is None for a sidecar or an
    index. Of a shard's tensors the index assigns those in `elsewhere` to another shard, and does
    not name those in `unlisted`.
    """

    name: str
    path: Path
    state: FileState
    mode: int
    folder_mode: int
    header: Header | None
    elsewhere: frozenset[str] = frozenset()
    unlisted: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    @property
    def mtime_ns(self) -> int:
        """The modification time as it travels: the nearest that 64 bits of nanoseconds hold."""
        return max(-MAX_MTIME_NS, min(self.state.mtime_ns, MAX_MTIME_NS))

    def check_unchanged(self, found: os.stat_result, doing: str, hint: str) -> None:
        """Raise CheckpointError unless `found` is the file that was opened, as it was then.

        To be asked of a descriptor before it is read, and again when all has been read.
        """
        difference = self.state.difference(found)
        if difference:
            what = f"{self.name} changed while it was being {doing}: {difference}"
            raise CheckpointError(what, hint=hint)


def open_shard(name: str, path: Path, folder_mode: int, limits: HeaderLimits) -> SourceFile:
    """A safetensors file, with its header."""
    with open_regular(path, name) as (fd, nbytes):
        before = os.fstat(fd)
        return _source(name, path, folder_mode, fd, before, header_of(fd, nbytes, name, limits))


def open_plain(name: str, path: Path, folder_mode: int) -> SourceFile:
    """Any other file, which can be read: better said now than in mid stream."""
    with open_regular(path, name) as (fd, _):
        return _source(name, path, folder_mode, fd, os.fstat(fd), None)


def _source(
    name: str,
    path: Path,
    folder_mode: int,
    fd: int,
    before: os.stat_result,
    header: Header | None,
) -> SourceFile:
    mode = before.st_mode & ALL_MAY
    file = SourceFile(name, path, FileState.of(before), mode, folder_mode, header)
    # Again, after its header was read: a rewrite in between would be sent under the old header.
    file.check_unchanged(os.fstat(fd), "opened", "run it again when no process writes to it")
    return file
