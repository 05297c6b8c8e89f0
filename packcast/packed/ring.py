"""The slots: device buffers made once, taken strictly in chunk order on every rank.

Chunk i uses slot i mod `num_buffers`. On CUDA a slot's reuse is ordered by events between three
lanes (fill, communication, drain) and the host never waits; on a CPU host memory and slot are one,
so a slot is free again when the loop has released it and no host thread holds a part of it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import torch

from packcast.errors import PackcastError
from packcast.packed.counters import Counters
from packcast.packed.lanes import Lane, LaneClock, Mark
from packcast.packed.plan import PAGE, Chunk, align_up, ring_nbytes, trailer_nbytes

# broadcast(tensor, root): in place, on the current stream, blocking on a CPU; `root` is a rank.
Broadcast = Callable[[torch.Tensor, int], object]


def host_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied, without NumPy; keep the tensor alive."""
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


class Slot:
    """One device buffer with the marks of those who used it last."""

    def __init__(self, index: int, memory: torch.Tensor) -> None:
        self.memory = memory
        self.turn = index  # the chunk that may use the slot now
        self.holders = 0  # host threads that use a part of it; on a CPU only
        self.released = False  # by the loop, for this turn
        self.filled: Mark | None = None
        self.arrived: Mark | None = None
        self.drained: Mark | None = None


class Ring:
    """`num_buffers` slots of `buffer_size` and a trailer, their lanes, and who may use them when.

    Built and used by the main thread; `await_turn`, `hold` and `let_go` by host threads too.
    """

    def __init__(
        self, device: torch.device, buffer_size: int, num_buffers: int, counters: Counters
    ) -> None:
        self.device = device
        self.is_host = device.type == "cpu"
        self.trailer_nbytes = trailer_nbytes(buffer_size)
        self.counters = counters
        self.fill, self.comm, self.drain = Lane(device), Lane(device), Lane(device)
        self.clock = LaneClock(device, counters)
        memory = torch.empty(
            ring_nbytes(buffer_size, num_buffers), dtype=torch.uint8, device=device
        )
        for lane in (self.fill, self.comm, self.drain):
            lane.wait_for_caller(device)
        self._slots = [Slot(i, part) for i, part in enumerate(memory.chunk(num_buffers))]
        self._changed = threading.Condition()
        self._stopped_by: PackcastError | None = None

    def trailer_offset(self, chunk: Chunk) -> int:
        """Where in its slot the chunk's trailer lies."""
        return align_up(chunk.nbytes, PAGE)

    def take(self, chunk: Chunk) -> Slot:
        """The chunk's slot, once its former use is over for the lanes, or on a CPU for the host."""
        slot = self.await_turn(chunk)
        for lane in (self.fill, self.comm):
            lane.wait(slot.arrived)
            lane.wait(slot.drained)
        return slot

    def broadcast(self, chunk: Chunk, slot: Slot, broadcast: Broadcast) -> None:
        """Payload and trailer from the chunk's root to every rank, on the communication lane."""
        message = slot.memory[: self.trailer_offset(chunk) + self.trailer_nbytes]
        self.comm.wait(slot.filled)
        with self.comm, self.counters.waiting_on("broadcast"):
            begin = self.comm.mark()
            broadcast(message, chunk.root)
            slot.arrived = self.comm.mark()
        self.clock.span("broadcast", chunk.index, chunk.nbytes, begin, slot.arrived)

    def release(self, slot: Slot) -> None:
        """The loop is done with the slot; the marks and holders say when it is free."""
        with self._changed:
            slot.released = True
            self._pass_on(slot)

    def await_turn(self, chunk: Chunk) -> Slot:
        """Block until the slot belongs to `chunk`; raises what stopped the ring."""
        slot = self._slots[chunk.index % len(self._slots)]
        with self._changed:
            self._changed.wait_for(lambda: self._stopped_by or slot.turn == chunk.index)
            if self._stopped_by:
                raise self._stopped_by
        return slot

    def hold(self, slot: Slot) -> None:
        """A host thread begins to use a part of the slot's memory (on a CPU)."""
        with self._changed:
            slot.holders += 1

    def let_go(self, slot: Slot) -> None:
        """The host thread has done with it."""
        with self._changed:
            slot.holders -= 1
            self._pass_on(slot)

    def stop(self, error: PackcastError) -> None:
        """Wake everyone who waits for a slot with `error`; the first one counts."""
        with self._changed:
            self._stopped_by = self._stopped_by or error
            self._changed.notify_all()

    def synchronize(self) -> None:
        """Block until all lanes are empty and every stage on them is counted."""
        for lane in (self.fill, self.comm, self.drain):
            lane.synchronize()
        self.clock.collect(wait=True)

    def _pass_on(self, slot: Slot) -> None:
        if slot.released and slot.holders == 0:
            slot.released = False
            slot.turn += len(self._slots)
            self._changed.notify_all()
