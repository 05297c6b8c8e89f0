"""The slots: device buffers made once, taken strictly in chunk order on every rank.

Chunk i uses slot i mod `num_buffers`. On CUDA a slot's reuse is ordered by events between three
streams (fill, communication, drain) and the host never waits; on a CPU the host waits for the events
of those who used it last.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from packcast.packed.counters import Counters
from packcast.packed.plan import align_up
from packcast.packed.streams import Completion, Stream, StreamEvent, StreamTimer

# broadcast(tensor, root): in place, on the current stream, blocking on a CPU; `root` is a rank. It
# may return an event: the tensor may be read before that has been passed, but written only after.
Broadcast = Callable[[torch.Tensor, int], Completion | None]

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
        communication stream wait for whoever used it before.
        """


class Slot:
    """One buffer with the events of those who used it last."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.filled: Completion | None = None
        self.arrived: Completion | None = None
        self.drained: Completion | None = None
        self.sent: Completion | None = None  # to the next rank, where a broadcast is a chain

    def is_free(self) -> bool:
        """Has everyone done with the slot? Never blocks."""
        return all(event is None or event.passed() for event in self._events())

    def synchronize(self) -> None:
        """Block this host thread until everyone has done with the slot."""
        for event in self._events():
            if event is not None:
                event.synchronize()

    def _events(self) -> tuple[Completion | None, ...]:
        return self.filled, self.arrived, self.drained, self.sent


class Ring:
    """`num_buffers` slots of `slot_nbytes`, their streams, and who may use them when.

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
        self.fill, self.drain = Stream(device), Stream(device)
        self.comm = Stream(device, urgent=True)
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
        """The chunk's slot, once its former use is over for the streams, or on a CPU for the host."""
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
        for stream in (self.fill, self.comm):
            stream.wait(slot.arrived)
            stream.wait(slot.drained)
        return slot

    def broadcast(self, chunk: Carried, slot: Slot, broadcast: Broadcast) -> None:
        """Payload and trailer from the chunk's root to every rank, on the communication stream."""
        self.comm.wait(slot.filled)
        with self.comm, self.counters.waiting_on("broadcast"):
            begin = self.comm.begin()
            memory = slot.memory[: chunk.wire_nbytes] if chunk.own is None else chunk.own
            slot.sent = broadcast(memory, chunk.root)
            self.num_broadcast += 1
            slot.arrived = self.comm.record()
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
        events: deque[StreamEvent] = deque()
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
                events.append(self.comm.record())
            # Not far ahead: a launch blocks for good where too many are waiting on a dead peer.
            if len(events) > _MAX_DRY:
                if not events.popleft().passes_within(patience_s):
                    return False
                self.num_dry += 1
        return all(event.passes_within(patience_s) for event in events)

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
        """Block until all streams are empty and every stage on them is counted."""
        for stream in (self.fill, self.comm, self.drain):
            stream.synchronize()
        for slot in self._slots:
            if slot.sent is not None:
                slot.sent.synchronize()
        self.clock.collect(wait=True)

    def is_idle(self) -> bool:
        """Are all streams empty? Never blocks."""
        return all(stream.is_idle() for stream in (self.fill, self.comm, self.drain))

    def _count(self, counters: Counters | None) -> None:
        """From now on, while the streams are empty."""
        self._given = counters
        self.counters = counters or Counters()
        for stream in (self.fill, self.comm, self.drain):
            stream.timed = counters is not None
        self.clock = StreamTimer(self.device, counters)

    def _after_caller(self) -> None:
        """Memory just allocated on the caller's stream may still be in use there until then."""
        for stream in (self.fill, self.comm, self.drain):
            stream.wait_for_caller(self.device)

    def _slot_of(self, chunk: Carried) -> Slot:
        return self._slots[chunk.index % len(self._slots)]
