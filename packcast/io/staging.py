"""Host memory between files and slots: pinned beside a GPU, the slots themselves on a CPU.

With room for n units, unit u uses the slot of unit u - n once that is done.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from packcast.io.pinned import PinnedMemory
from packcast.io.schedule import ScheduledUnit
from packcast.packed.plan import (
    Chunk,
    pinned_nbytes,
    slot_nbytes,
    staged_nbytes,
    staging_count,
    unit_nbytes,
)
from packcast.packed.ring import MAX_VIEWS, Ring, Slot, host_view

_IDLE_LIMIT_S = 1.0  # for copies of a broken transfer
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Buffers:
    """What both ends of a rank share, and the share of pinned memory that each of them may take."""

    ring: Ring
    buffer_size: int
    staging_nbytes: int
    tag: bytes


class Staging:
    """One end's host memory: `num_units` places, at `address` and as the tensor `memory`.

    Where it `is_slots` a unit is a chunk and lies where it is broadcast from, so there is nothing
    to copy; else it is pinned here, once, and given back by `free`.
    """

    def __init__(self, buffers: Buffers) -> None:
        size = buffers.buffer_size
        self.is_slots = buffers.ring.is_host
        self._pinned: PinnedMemory | None = None
        if self.is_slots:
            self.memory = buffers.ring.memory
            self.num_units = buffers.ring.num_slots
            self.unit_nbytes, self._place_nbytes = size, slot_nbytes(size)
        else:
            self._pinned = PinnedMemory(pinned_nbytes(size, buffers.staging_nbytes))
            self.memory = self._pinned.tensor
            self.num_units = staging_count(size, buffers.staging_nbytes)
            self.unit_nbytes, self._place_nbytes = unit_nbytes(size), staged_nbytes(size)
        self.pinned_nbytes = self._pinned.nbytes if self._pinned else 0
        self.address = self.memory.data_ptr()
        self._bytes = host_view(self.memory)
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def place(self, chunk: Chunk, unit: int) -> int:
        """The offset at which a unit of a chunk lies; `unit` counts this end's units."""
        return (chunk.index if self.is_slots else unit) % self.num_units * self._place_nbytes

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of it, not copied."""
        return self._bytes[offset : offset + nbytes]

    def copy_to(self, slot: Slot, unit: ScheduledUnit) -> None:
        """Beside a GPU: give the copy of the unit into its slot to the current stream."""
        there = slot.view(unit.slot_offset, unit.nbytes)
        there.copy_(self._here(unit), non_blocking=True)

    def copy_from(self, slot: Slot, unit: ScheduledUnit) -> None:
        """Give the copy of the unit out of its slot to the current stream."""
        if not self.is_slots:
            there = slot.view(unit.slot_offset, unit.nbytes)
            self._here(unit).copy_(there, non_blocking=True)

    def trailer_offset(self, unit: ScheduledUnit) -> int:
        """Where a chunk's trailer lies beside its first unit: behind it, as beside the last."""
        if unit.is_last:
            return unit.memory_offset + unit.chunk.trailer_offset
        return unit.memory_offset + self.unit_nbytes

    def copy_trailer_from(self, slot: Slot, unit: ScheduledUnit) -> None:
        """Give the copy of the trailer, beside the first unit, to the current stream."""
        if not unit.is_last:
            begin, nbytes = unit.chunk.trailer_offset, unit.chunk.trailer_nbytes
            into = self.trailer_offset(unit)
            there = slot.view(begin, nbytes)
            self.memory[into : into + nbytes].copy_(there, non_blocking=True)

    def free(self, *, is_idle: bool) -> None:
        """Free the memory; `is_idle`: no copy and no I/O thread can be using it."""
        if self._pinned is not None:
            self._pinned.close(is_idle=is_idle)

    def _here(self, unit: ScheduledUnit) -> torch.Tensor:
        """Kept, as a slot's views are."""
        key = begin, nbytes = unit.memory_offset, unit.nbytes
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            found = self._views[key] = self.memory[begin : begin + nbytes]
        return found


def becomes_idle(ring: Ring) -> bool:
    """Whether all copies of a transfer that is over have ended, or do so within a second."""
    deadline = time.monotonic() + _IDLE_LIMIT_S
    while not ring.is_idle():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
