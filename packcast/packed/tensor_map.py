"""Which bytes of which chunk belong to which tensor: flat numbers on the host, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from packcast.packed.plan import Extent


class Carrier(Protocol):
    """A chunk or a unit: extents one after the other from its first byte on."""

    @property
    def extents(self) -> tuple[Extent, ...]:
        """None of them empty."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Runs of tensors' bytes by chunk; int64 columns on the host.

    Row r is the `nbytes[r]` bytes of tensor `tensor[r]` from `offset[r]` on; they are in their
    chunk from `slot_offset[r]` on. Chunk i has the rows `ends[i]` up to `ends[i + 1]`.
    """

    tensor: torch.Tensor
    offset: torch.Tensor
    slot_offset: torch.Tensor
    nbytes: torch.Tensor
    ends: torch.Tensor

    @property
    def num_chunks(self) -> int:
        return len(self.ends) - 1

    def chunks(self) -> torch.Tensor:
        """The chunk of each row."""
        return repeated(self.ends.diff())

    def of(self, chunk: int) -> Rows:
        """The rows of one chunk, as views."""
        begin, end = self.ends[chunk : chunk + 2].tolist()
        columns = (self.tensor, self.offset, self.slot_offset, self.nbytes)
        tensor, offset, slot_offset, nbytes = (column[begin:end] for column in columns)
        return Rows(tensor, offset, slot_offset, nbytes, torch.tensor((0, end - begin)))


@dataclass(frozen=True, slots=True, eq=False)
class TensorMap:
    """The rows of all tensors, and the chunks that have the first and the last byte of each.

    Every tensor has a row, an empty tensor one of 0 bytes. Tensor t is complete once the chunks up
    to `last[t]` have landed.
    """

    rows: Rows
    first: torch.Tensor
    last: torch.Tensor

    def num_complete(self) -> torch.Tensor:
        """How many tensors are complete after each chunk, if chunks land in order."""
        return Groups.by(self.last, self.rows.num_chunks).ends[1:]


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Tensors sorted by chunk: those of chunk i are `order[ends[i] : ends[i + 1]]`; int64."""

    order: torch.Tensor
    ends: torch.Tensor

    @staticmethod
    def by(
        chunk_of: torch.Tensor, num_chunks: int, is_wanted: torch.Tensor | None = None
    ) -> Groups:
        """The tensors of the mask, or all, in order within each chunk."""
        order = chunk_of.argsort(stable=True)
        if is_wanted is not None:
            order = order[is_wanted[order]]
        counts = torch.bincount(chunk_of[order], minlength=num_chunks)
        return Groups(order, ends_of(counts))

    def of(self, chunk: int) -> torch.Tensor:
        begin, end = self.ends[chunk : chunk + 2].tolist()
        return self.order[begin:end]


def map_tensors(
    runs: Sequence[tuple[int, int, int]], file_nbytes: Sequence[int], chunks: Sequence[Carrier]
) -> TensorMap:
    """The map of tensors that are `runs` (file, begin, end) of bytes of files.

    Runs are sorted, do not overlap and do not begin at byte 0 of a file (there is the header of a
    safetensors file). The chunks carry every byte of them once, each file's in order. An empty
    tensor rides with the byte before it.
    """
    base = ends_of(torch.tensor(file_nbytes, dtype=torch.int64))
    file, begin, end = torch.tensor(runs, dtype=torch.int64).view(-1, 3).unbind(1)
    begin, end = base[file] + begin, base[file] + end  # in the concatenation of all files
    extents = torch.tensor(
        [(each.file, each.offset, each.nbytes) for chunk in chunks for each in chunk.extents],
        dtype=torch.int64,
    ).view(-1, 3)
    low = base[extents[:, 0]] + extents[:, 1]
    high = low + extents[:, 2]
    at, of_chunk = _places(extents[:, 2], chunks)

    # An extent has parts of consecutive tensors: from the first one that ends behind the extent's
    # first byte up to the first one that begins behind its last byte.
    begins_at = torch.minimum(begin, end - 1)
    first = torch.searchsorted(end, low, right=True)
    counts = torch.searchsorted(begins_at, high) - first
    extent, ordinal = enumerated(counts)
    tensor = first[extent] + ordinal
    row_low = torch.maximum(begin[tensor], low[extent])
    row_high = torch.minimum(end[tensor], high[extent])
    nbytes = row_high - row_low
    chunk = of_chunk[extent]
    rows = Rows(
        tensor,
        row_low - begin[tensor],
        at[extent] + row_low - low[extent],
        nbytes,
        ends_of(torch.bincount(chunk, minlength=len(chunks))),
    )
    assert int(nbytes.sum()) == int((end - begin).sum()), "the chunks do not carry every tensor"
    return TensorMap(rows, *_first_and_last(tensor, chunk, len(begin), len(chunks)))


def ends_of(counts: torch.Tensor) -> torch.Tensor:
    """0 and the running sum of the counts."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def repeated(counts: torch.Tensor) -> torch.Tensor:
    """Each index as often as its count: 0, 0, 2 for the counts 2, 0, 1.

    By operations that stay in this thread: repeat_interleave, indexing and stack wake all threads
    of the CPU, which takes many times longer than the work itself.
    """
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    steps = ends[:-1][ends[:-1] < total]
    marks = torch.zeros(total, dtype=torch.int64)
    return marks.index_add_(0, steps, torch.ones_like(steps)).cumsum(0)


def enumerated(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `repeated`, and the number of each repetition, from 0."""
    index = repeated(counts)
    begins = counts.cumsum(0) - counts
    return index, torch.arange(len(index)) - begins.index_select(0, index)


def _places(nbytes: torch.Tensor, chunks: Sequence[Carrier]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each extent begins in its chunk, and the index of that chunk."""
    of_chunk = repeated(torch.tensor([len(chunk.extents) for chunk in chunks], dtype=torch.int64))
    begins = nbytes.cumsum(0) - nbytes
    chunk_nbytes = torch.zeros(len(chunks), dtype=torch.int64).index_add_(0, of_chunk, nbytes)
    return begins - (chunk_nbytes.cumsum(0) - chunk_nbytes)[of_chunk], of_chunk


def _first_and_last(
    tensor: torch.Tensor, chunk: torch.Tensor, num_tensors: int, num_chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest chunk among each tensor's rows."""
    first = torch.full((num_tensors,), num_chunks, dtype=torch.int64)
    last = torch.full((num_tensors,), -1, dtype=torch.int64)
    first.scatter_reduce_(0, tensor, chunk, "amin")
    last.scatter_reduce_(0, tensor, chunk, "amax")
    return first, last
