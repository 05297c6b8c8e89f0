"""The kernel's stand-in on a CPU: what a table says, row by row, with nothing of the library's.

Also a program, for Triton's interpreter: `python -m tests.packed.tables SEED` runs the kernel.
"""

from __future__ import annotations

import ctypes
import random
import sys

import torch

POISON = 0xA5


def move_by_rows(
    table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, alone: bool = False
) -> None:
    """As `gather.Move`, on the host."""
    assert (table.dtype, table.shape[1:], table.is_contiguous()) == (torch.int64, (3,), True)
    for address, offset, nbytes in table.tolist():
        assert nbytes > 0
        assert 0 <= offset <= slot.numel() - nbytes
        inside = slot.data_ptr() + offset
        source, target = (address, inside) if into_slot else (inside, address)
        ctypes.memmove(target, source, nbytes)


def random_table(dice: random.Random, memory: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Runs of the memory and where they are in the slot, none over another; some well aligned."""
    rows, at, offset = [], 0, 0
    sizes = [*dice.sample(range(1, 301), 30), 16_384, 16_384 + dice.randint(1, 40), 40_000]
    for nbytes in dice.sample(sizes, len(sizes)):
        at, offset = at + dice.randint(0, 20), offset + dice.randint(0, 20)
        if dice.random() < 0.7:
            at += -(memory.data_ptr() + at) % 16
            offset += -(slot.data_ptr() + offset) % 16
        rows.append((memory.data_ptr() + at, offset, nbytes))
        at, offset = at + nbytes, offset + nbytes
    return torch.tensor(rows)


def main(seed: int) -> None:
    """The kernel against the rows, into slots and out of them."""
    from packcast.packed import kernels

    dice = random.Random(seed)
    for programs in (1, 5, 1000):
        sent = torch.randint(0, 256, (1 << 17,), dtype=torch.uint8)
        slot = torch.full((1 << 17,), POISON, dtype=torch.uint8)[dice.randint(0, 3) :]
        table = random_table(dice, sent, slot)
        expected = slot.clone()
        move_by_rows(table, expected, into_slot=True)
        kernels.launch(table, slot, into_slot=True, programs=programs)
        assert torch.equal(slot, expected)
        landed = torch.full_like(sent, POISON)
        table[:, 0] += landed.data_ptr() - sent.data_ptr()
        kernels.launch(table, slot, into_slot=False, programs=programs)
        by_rows = torch.full_like(sent, POISON)
        table[:, 0] += by_rows.data_ptr() - landed.data_ptr()
        move_by_rows(table, slot, into_slot=False)
        assert torch.equal(landed, by_rows)


if __name__ == "__main__":
    main(int(sys.argv[1]))
