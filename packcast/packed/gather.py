"""Many copies between a slot and the addresses of its parts, as one kernel where possible.

It makes tables of addresses from rows; it knows no names, streams or wire.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch

from packcast.packed.selftested import self_tested
from packcast.packed.tensor_map import Rows, ends_of, enumerated

# A program of the kernel copies a few pieces at a time; small ones let all programs end together.
PIECE_NBYTES = 64 << 10
_MAX_TESTED_NBYTES = 300


class Move(Protocol):
    """Copies a table's pieces into a slot, or out of it, on the current stream of its device.

    `alone`: no broadcast runs beside it, so it may fill the GPU.
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
    if bool((counts == 1).all()):  # fast path: many small parts
        return _beside(addresses, slot_offsets, nbytes), counts
    part, ordinal = enumerated(counts)
    addresses, slot_offsets, nbytes = (
        column.index_select(0, part) for column in (addresses, slot_offsets, nbytes)
    )
    shift = ordinal * piece_nbytes
    left = (nbytes - shift).clamp(max=piece_nbytes)
    return _beside(addresses + shift, slot_offsets + shift, left), counts


def tables_of(
    rows: Rows,
    addresses: torch.Tensor,
    device: torch.device,
    is_wanted: Sequence[bool] | None = None,
) -> Sequence[torch.Tensor]:
    """Each chunk's table, all copied to the device at once; empty for chunks not wanted.

    `addresses` has one address per tensor, on the host.
    """
    nbytes = rows.nbytes
    if is_wanted is not None:
        nbytes = nbytes * torch.tensor(is_wanted, dtype=torch.int64).index_select(0, rows.chunks())
    table, counts = pieces_of(_places_of(rows, addresses), rows.slot_offset, nbytes)
    ends = ends_of(counts)[rows.ends]
    tables: Sequence[torch.Tensor] = on_device(table, device).split(ends.diff().tolist())
    return tables


def table_of(rows: Rows, addresses: torch.Tensor, chunk: int) -> torch.Tensor:
    """The table of one chunk, on the host."""
    mine = rows.of(chunk)
    return pieces_of(_places_of(mine, addresses), mine.slot_offset, mine.nbytes)[0]


def pieces_each(rows: Rows) -> torch.Tensor:
    """How many rows each chunk's table has."""
    counts = (rows.nbytes + PIECE_NBYTES - 1) // PIECE_NBYTES
    return ends_of(counts)[rows.ends].diff()


def _places_of(rows: Rows, addresses: torch.Tensor) -> torch.Tensor:
    return addresses.index_select(0, rows.tensor) + rows.offset


def _beside(*columns: torch.Tensor) -> torch.Tensor:
    table = torch.empty((len(columns[0]), len(columns)), dtype=torch.int64)
    for i, column in enumerate(columns):
        table[:, i] = column
    return table


def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The table on the device, copied on the current stream; the host does not wait."""
    if device.type != "cuda" or not len(table):
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


@functools.cache
def move_on(device: torch.device) -> Move | None:
    """The kernel, if it works there; the first call waits for the device."""

    def load() -> Move:
        from packcast.packed import kernels

        shared, most = kernels.programs_on(device)

        def move(
            table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, alone: bool = False
        ) -> None:
            programs = most if alone else shared
            kernels.launch(table, slot, into_slot=into_slot, programs=programs)

        return move

    return self_tested(device, load, is_right)


def is_right(move: Move, device: torch.device) -> bool:
    """Self-test: every size up to a few words, aligned or not, into a slot and out again."""
    sizes = [*range(1, _MAX_TESTED_NBYTES), PIECE_NBYTES + 9]
    starts = [0]
    for nbytes in sizes[:-1]:
        # Every second one is aligned.
        starts.append(starts[-1] + nbytes if nbytes % 2 else -(-(starts[-1] + nbytes) // 16) * 16)
    total = starts[-1] + sizes[-1]
    # Not random: that would advance the generator that the caller has seeded.
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
