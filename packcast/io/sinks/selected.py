"""Where the tensors of a selection are in a local file that has more of them, at other offsets.

Knows headers only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from packcast.checkpoint.header import Header, read_header
from packcast.checkpoint.tensor_table import Tensor
from packcast.errors import CheckpointError


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
    """None where the local file is no safetensors file, or has the very header that is offered."""
    try:
        local = read_header(path, name)
    except CheckpointError:
        return None
    if local.json_bytes == offered.json_bytes:
        return None
    return SelectedTensors(offered.tensors, local)
