"""Many copies between a slot and the places of its parts, as one kernel where that can be had.

It knows tables of addresses; nothing of names, lanes or the wire.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch

from packcast.packed.proven import proven_on

# Each program of the kernel takes one piece at a time: so small that they all end together.
PIECE_NBYTES = 64 << 10
_MAX_PROVEN_NBYTES = 300


class Move(Protocol):
    """Copies a table's pieces into a slot, or out of it, on the current stream of its device.

    `alone`: no broadcast runs beside it that would want its share of the GPU.
    """

    def __call__(
        self, table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, alone: bool = False
    ) -> None: ...


def pieces_of(
    addresses: torch.Tensor,
    slot_offsets: torch.Tensor,
    nbytes: torch.Tensor,
    piece_nbytes: int = PIECE_NBYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of some parts, and how many of its rows each part has; all int64, on the host.

    A row is (address, offset in the slot, bytes) of a piece of at most `piece_nbytes`.
    """
    counts = (nbytes + piece_nbytes - 1) // piece_nbytes
    if bool((counts == 1).all()):  # many small ones, which are made often
        return _beside(addresses, slot_offsets, nbytes), counts
    ends = counts.cumsum(0)
    total = int(counts.sum())
    # By these operations, since others (repeat_interleave, indexing, stack) wake all threads of the
    # CPU, which takes many times longer than the work itself.
    part = torch.zeros(total, dtype=torch.int64)
    steps = ends[:-1][ends[:-1] < total]
    part = part.index_add_(0, steps, torch.ones_like(steps)).cumsum(0)
    addresses, slot_offsets, nbytes, begins = (
        column.index_select(0, part) for column in (addresses, slot_offsets, nbytes, ends - counts)
    )
    shift = (torch.arange(total) - begins) * piece_nbytes
    left = (nbytes - shift).clamp(max=piece_nbytes)
    return _beside(addresses + shift, slot_offsets + shift, left), counts


def _beside(*columns: torch.Tensor) -> torch.Tensor:
    """The columns as a table."""
    table = torch.empty((len(columns[0]), len(columns)), dtype=torch.int64)
    for i, column in enumerate(columns):
        table[:, i] = column
    return table


def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The table where the kernel reads it, from the current stream on; the host does not wait."""
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)


@functools.cache
def move_on(device: torch.device) -> Move | None:
    """The kernel, if it may be used there; the first call waits for the device."""

    def load() -> Move:
        from packcast.packed import kernel

        shared, most = kernel.programs_on(device)

        def move(
            table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, alone: bool = False
        ) -> None:
            programs = most if alone else shared
            kernel.launch(table, slot, into_slot=into_slot, programs=programs)

        return move

    return proven_on(device, load, is_right)


def is_right(move: Move, device: torch.device) -> bool:
    """Every size up to a few words, at aligned places and others, into a slot and out again."""
    sizes = [*range(1, _MAX_PROVEN_NBYTES), PIECE_NBYTES + 9]
    starts = [0]
    for nbytes in sizes[:-1]:
        # Every other one is aligned.
        starts.append(starts[-1] + nbytes if nbytes % 2 else -(-(starts[-1] + nbytes) // 16) * 16)
    total = starts[-1] + sizes[-1]
    # Not random: that would move on the generator that the caller has seeded.
    sent = (torch.arange(total, device=device) * 37 % 251).to(torch.uint8)
    slot, landed = torch.zeros_like(sent), torch.zeros_like(sent)
    places, lengths = torch.tensor(starts), torch.tensor(sizes)
    for memory, into_slot in ((sent, True), (landed, False)):
        table, _ = pieces_of(places + memory.data_ptr(), places, lengths)
        move(table.to(device), slot, into_slot=into_slot)
    covered = torch.zeros(total, dtype=torch.bool)
    for at, nbytes in zip(starts, sizes, strict=True):
        covered[at : at + nbytes] = True
    expected = torch.where(covered, sent.cpu(), 0)
    return torch.equal(slot.cpu(), expected) and torch.equal(landed.cpu(), expected)
