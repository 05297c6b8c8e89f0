"""The local files and tensors to compare an offer with.

Reads headers of a selection's files, and otherwise names and sizes only.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from packcast.checkpoint.checkpoint import Checkpoint
from packcast.checkpoint.header import Header, read_header
from packcast.checkpoint.outgoing import FileSpec
from packcast.checkpoint.reading import FileState, unreadable
from packcast.checkpoint.sourcefile import SourceFile
from packcast.checkpoint.tensor_table import Tensor
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
    names = (name for name in sorted(offered | beside) if (path / name).is_file())
    return Checkpoint(path, tuple(_local_file(name, path / name) for name in names), ())


def _local_file(name: str, path: Path) -> SourceFile:
    real = path.resolve()
    return SourceFile(name, real, FileState.of(real.stat()), mode=0, folder_mode=0, header=None)


def counterparts(local: Checkpoint, files: Sequence[FileSpec]) -> tuple[SourceFile | None, ...]:
    """The local file for each offered one: by name, but one single file stands for another."""
    if len(files) == 1 and len(local.files) == 1 and local.path.is_file():
        return (local.files[0],)
    by_name = {file.name: file for file in local.files}
    return tuple(by_name.get(spec.name) for spec in files)


def check_unchanged(local: SourceFile, status: os.stat_result) -> None:
    difference = local.state.difference(status)
    if difference:
        raise CheckpointError(
            f"{local.path} changed while it was being compared: {difference}", hint="run it again"
        )


class SelectedTensors:
    """The offered tensors of one file, each with its place in the local one of the same name."""

    def __init__(self, offered: Sequence[Tensor], local: Header) -> None:
        there = {tensor.name: tensor for tensor in local.tensors}
        self._offered = offered
        self._at: dict[int, int] = {}
        self.absent: list[int] = []  # or of another dtype or shape
        for index, tensor in enumerate(offered):
            twin = there.get(tensor.name)
            if twin is None or (twin.dtype, twin.shape) != (tensor.dtype, tensor.shape):
                self.absent.append(index)
            else:
                self._at[index] = twin.begin
        self._by_place = sorted(
            (begin, index) for index, begin in self._at.items() if offered[index].nbytes
        )

    def local_offset(self, offset: int) -> int | None:
        """Of a byte of the offered file; None in its header, or where the tensor is absent."""
        index = bisect_right(self._offered, offset, key=lambda tensor: tensor.end)
        begin = self._at.get(index)
        if begin is None or offset < self._offered[index].begin:
            return None
        return begin + offset - self._offered[index].begin

    def offered_offset(self, local_offset: int) -> int:
        """The other way."""
        begin, index = self._by_place[bisect_right(self._by_place, (local_offset, 1 << 62)) - 1]
        return self._offered[index].begin + local_offset - begin


def selected_tensors(offered: Header, path: Path, name: str) -> SelectedTensors | None:
    """None if the local file is no safetensors file, or has the offered header."""
    try:
        local = read_header(path, name)
    except CheckpointError:
        return None
    if local.json_bytes == offered.json_bytes:
        return None
    return SelectedTensors(offered.tensors, local)
