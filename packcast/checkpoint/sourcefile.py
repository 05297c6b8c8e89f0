"""One file of a checkpoint: its state and header when it was opened, and whether it has changed.

Reads a shard's header, never a tensor's bytes.
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
    `folder_mode` those that all its folders have. `header` is None for a sidecar or an index. Of a
    shard's tensors, the index assigns `elsewhere` to another shard and does not name `unlisted`.
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
        """The modification time to send: the nearest that 64 bits of nanoseconds can hold."""
        return max(-MAX_MTIME_NS, min(self.state.mtime_ns, MAX_MTIME_NS))

    def check_unchanged(self, found: os.stat_result, doing: str, hint: str) -> None:
        """Raise CheckpointError unless `found` is the file that was opened, unchanged.

        Call it with a descriptor's state before reading, and again after it.
        """
        difference = self.state.difference(found)
        if difference:
            what = f"{self.name} changed while it was being {doing}: {difference}"
            raise CheckpointError(what, hint=hint)


def open_source(
    name: str, path: Path, folder_mode: int, limits: HeaderLimits | None = None
) -> SourceFile:
    """Open a file and check that it can be read: a shard, with `limits` for its header, or another.

    Raises CheckpointError.
    """
    with open_regular(path, name) as (fd, nbytes):
        before = os.fstat(fd)
        header = header_of(fd, nbytes, name, limits) if limits else None
        mode = before.st_mode & ALL_MAY
        file = SourceFile(name, path, FileState.of(before), mode, folder_mode, header)
        # After the header was read: a new file would be sent under the old header.
        file.check_unchanged(os.fstat(fd), "opened", "run it again when no process writes to it")
        return file
