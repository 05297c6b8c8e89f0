"""The slots: device buffers made once, taken strictly in chunk order on every rank.

Chunk i uses slot i mod `num_buffers`. On CUDA a slot's reuse is ordered by events between three
lanes (fill, communication, drain) and the host never waits; on a CPU the host waits for the marks
of those who used it last.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from packcast.packed.counters import Counters
from packcast.packed.lanes import Lane, LaneClock, Mark, Passage
from packcast.packed.plan import align_up

# broadcast(tensor, root): in place, on the current stream, blocking on a CPU; `root` is a rank. It
# may return a mark: the tensor may be read before that has been passed, but written only after.
Broadcast = Callable[[torch.Tensor, int], Passage | None]

_MAX_DRY = 16  # broadcasts under way

NOBODY = -1  # the rank of one that is no chunk's root


def host_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied, without NumPy; keep the tensor alive."""
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


class Carried(Protocol):
    """What the ring knows of a chunk, whichever wire it is made for."""

    @property
    def index(self) -> int:
        """Its place in the order, from 0."""

    @property
    def root(self) -> int:
        """The rank it comes from."""

    @property
    def nbytes(self) -> int:
        """Payload."""

    @property
    def wire_nbytes(self) -> int:
        """What the collective carries, from the slot's first byte."""

    @property
    def own(self) -> torch.Tensor | None:
        """As many bytes that are broadcast from and into where they lie, instead of the slot's.

        The slot's turn passes all the same, its memory unused. Who gives it has made the
        communication lane wait for whoever used it before.
        """


class Slot:
    """One buffer with the marks of those who used it last."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.filled: Passage | None = None
        self.arrived: Passage | None = None
        self.drained: Passage | None = None
        self.sent: Passage | None = None  # to the next rank, where a broadcast is a chain

    def is_free(self) -> bool:
        """Has everyone done with the slot? Never blocks."""
        return all(mark is None or mark.passed() for mark in self._marks())

    def is_sent(self) -> bool:
        """Is its last broadcast over? Never blocks."""
        return all(mark is None or mark.passed() for mark in (self.arrived, self.sent))

    def synchronize(self) -> None:
        """Block this host thread until everyone has done with the slot."""
        for mark in self._marks():
            if mark is not None:
                mark.synchronize()

    def _marks(self) -> tuple[Passage | None, ...]:
        return self.filled, self.arrived, self.drained, self.sent


class Ring:
    """`num_buffers` slots of `slot_nbytes`, their lanes, and who may use them when.

    The slots are one allocation, made here unless `memory` is given for them. Where a chunk turns
    out larger (on a wire that learns sizes late), its slot grows to it, rounded up to a multiple of
    `step_nbytes`, or of an eighth of it if that is less. Without `counters` nothing is timed.
    Built and used by one thread.
    """

    def __init__(
        self,
        device: torch.device,
        slot_nbytes: int,
        num_buffers: int,
        counters: Counters | None = None,
        memory: torch.Tensor | None = None,
        *,
        step_nbytes: int = 1,
    ) -> None:
        self.device = device
        self.is_host = device.type == "cpu"
        # Copies would hold up the broadcasts that begin beside them, which are what takes long.
        self.fill, self.drain = Lane(device), Lane(device)
        self.comm = Lane(device, urgent=True)
        self._count(counters)
        if memory is None:
            memory = torch.empty(num_buffers * slot_nbytes, dtype=torch.uint8, device=device)
        self._after_caller()
        self.memory = memory
        self._slots = [
            Slot(memory[i * slot_nbytes : (i + 1) * slot_nbytes]) for i in range(num_buffers)
        ]
        self._step_nbytes = step_nbytes
        self.num_broadcast = 0
        self.num_dry = 0

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def is_free(self, chunk: Carried) -> bool:
        """Whether `take` would not block; on a CPU."""
        return self._slot_of(chunk).is_free()

    def await_sent(self, chunk: Carried) -> None:
        """Before `take`: block until the next rank has what was in the chunk's slot before."""
        sent = self._slot_of(chunk).sent
        if sent is not None:
            sent.synchronize()

    def take(self, chunk: Carried) -> Slot:
        """The chunk's slot, once its former use is over for the lanes, or on a CPU for the host."""
        slot = self._slot_of(chunk)
        if self.is_host:
            slot.synchronize()
        if chunk.own is None and slot.memory.numel() < chunk.wire_nbytes:
            slot.synchronize()  # or the memory could be given to others while it is in use
            slot.memory = torch.empty(0, dtype=torch.uint8, device=self.device)
            eighth = 1 << max(0, (chunk.wire_nbytes // 8).bit_length() - 1)
            nbytes = align_up(chunk.wire_nbytes, min(self._step_nbytes, eighth))
            slot.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self._after_caller()
        for lane in (self.fill, self.comm):
            lane.wait(slot.arrived)
            lane.wait(slot.drained)
        return slot

    def broadcast(self, chunk: Carried, slot: Slot, broadcast: Broadcast) -> None:
        """Payload and trailer from the chunk's root to every rank, on the communication lane."""
        self.comm.wait(slot.filled)
        with self.comm, self.counters.waiting_on("broadcast"):
            begin = self.comm.begin()
            memory = slot.memory[: chunk.wire_nbytes] if chunk.own is None else chunk.own
            slot.sent = broadcast(memory, chunk.root)
            self.num_broadcast += 1
            slot.arrived = self.comm.mark()
        over = slot.sent or slot.arrived
        self.clock.span("broadcast", chunk.index, chunk.nbytes, begin, over)

    def run_dry(
        self, chunks: Sequence[Carried], tokens: int, broadcast: Broadcast, patience_s: float
    ) -> bool:
        """After a failure: take part in the broadcasts that are left, whatever they carry.

        A peer's memory must not go while a broadcast may still be reading it, so where all ranks
        live they end what they began, at the speed of the broadcasts alone; then each of `tokens`
        ranks is heard once more. False where no broadcast has ended for `patience_s`.
        """
        marks: deque[Mark] = deque()
        token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self.comm.wait_for_caller(self.device)
        rest = [(chunk, self._slots[chunk.index % len(self._slots)]) for chunk in chunks]
        left = [
            (chunk.root, slot.memory[: chunk.wire_nbytes], slot)
            for chunk, slot in rest[self.num_broadcast :]
        ]
        for root, memory, slot in [*left, *((rank, token, None) for rank in range(tokens))]:
            if slot is not None:
                self.comm.wait(slot.filled)
                self.comm.wait(slot.drained)
            with self.comm:
                broadcast(memory, root)
                marks.append(self.comm.mark())
            # Not far ahead: a launch blocks for good where too many are waiting on a dead peer.
            if len(marks) > _MAX_DRY:
                if not marks.popleft().passes_within(patience_s):
                    return False
                self.num_dry += 1
        return all(mark.passes_within(patience_s) for mark in marks)

    def overwrite(self, byte: int) -> None:
        """Leave nothing of an earlier use in the slots; before the first chunk."""
        for slot in self._slots:
            slot.memory.fill_(byte)
        self._after_caller()

    def rewind(self, counters: Counters | None = None) -> None:
        """Begin again at chunk 0 with slot 0: for another run over chunks, once one is over.

        That one is counted and timed in `counters`, or not.
        """
        self.synchronize()
        if counters is not self._given:
            self._count(counters)
        self.num_broadcast = 0

    def synchronize(self) -> None:
        """Block until all lanes are empty and every stage on them is counted."""
        for lane in (self.fill, self.comm, self.drain):
            lane.synchronize()
        for slot in self._slots:
            if slot.sent is not None:
                slot.sent.synchronize()
        self.clock.collect(wait=True)

    def is_idle(self) -> bool:
        """Are all lanes empty? Never blocks."""
        return all(lane.is_idle() for lane in (self.fill, self.comm, self.drain))

    def is_sending(self) -> bool:
        """Is a broadcast under way of which this rank has all bytes? Never blocks."""
        return any(
            not slot.is_sent() and (slot.filled is None or slot.filled.passed())
            for slot in self._slots
        )

    def _count(self, counters: Counters | None) -> None:
        """From now on, while the lanes are empty."""
        self._given = counters
        self.counters = counters or Counters()
        for lane in (self.fill, self.comm, self.drain):
            lane.timed = counters is not None
        self.clock = LaneClock(self.device, counters)

    def _after_caller(self) -> None:
        """Memory just allocated on the caller's stream may still be in use there until then."""
        for lane in (self.fill, self.comm, self.drain):
            lane.wait_for_caller(self.device)

    def _slot_of(self, chunk: Carried) -> Slot:
        return self._slots[chunk.index % len(self._slots)]
