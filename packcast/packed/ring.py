"""The ring of slots: device buffers made once, used in chunk order on every rank.

Chunk i uses slot i mod `num_buffers`. On CUDA, events between three streams (fill, communication,
drain) order the reuse of a slot and the host never waits; on a CPU the host waits for the events.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from packcast.packed.counters import Counters
from packcast.packed.plan import PAGE, align_up
from packcast.packed.streams import Completion, Stream, StreamEvent, StreamTimer

# broadcast(tensor, root rank): in place, on the current stream, blocking on a CPU. If it returns an
# event, the tensor may be read at once, but written only after the event.
Broadcast = Callable[[torch.Tensor, int], Completion | None]

MAX_VIEWS = 64
_MAX_DRY = 16  # broadcasts under way

_libc = ctypes.CDLL(None)
_MADV_HUGEPAGE = 14  # asm-generic/mman-common.h

NOBODY = -1  # the rank of a process that is no chunk's root


def host_view(tensor: torch.Tensor) -> memoryview:
    """A view of a contiguous CPU tensor's bytes, without NumPy; the caller keeps the tensor."""
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _ask_for_huge_pages(memory: torch.Tensor) -> None:
    """Where the kernel gives them: a transfer between three processes then goes 1.2 times as fast,
    since copies from another process's memory look up every page."""
    begin = align_up(memory.data_ptr(), PAGE)
    nbytes = memory.data_ptr() + memory.nbytes - begin
    if nbytes > 0:
        _libc.madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(nbytes // PAGE * PAGE), _MADV_HUGEPAGE
        )


class Carried(Protocol):
    """What the ring knows of a chunk, on every wire.

    The collective carries `wire_nbytes` from the slot's first byte, `nbytes` of them payload. If
    `own` is a tensor of as many bytes, it is broadcast in place instead and the slot stays unused.
    The caller must already have made the communication stream wait for its earlier users.
    """

    @property
    def index(self) -> int: ...
    @property
    def root(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def wire_nbytes(self) -> int: ...
    @property
    def own(self) -> torch.Tensor | None: ...


class Slot:
    """One buffer with the events of its last uses."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._views: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self.filled: Completion | None = None
        self.arrived: Completion | None = None
        self.drained: Completion | None = None
        self.sent: Completion | None = None  # to the next rank, where a broadcast is a chain

    def view(self, begin: int, nbytes: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """A part of the memory. The same few come again and again, and making one takes as long as
        the launch of its copy."""
        key = (begin, nbytes, dtype)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= MAX_VIEWS:  # of chunks that all have other sizes
                self._views.clear()
            found = self.memory[begin : begin + nbytes]
            # In inference mode a view of another type could not be written outside it; a slice can.
            self._views[key] = found = found if dtype is torch.uint8 else found.view(dtype)
        return found

    def replace(self, memory: torch.Tensor) -> None:
        """Use other memory from now on."""
        self.memory = memory
        self._views.clear()

    def is_free(self) -> bool:
        """Whether its last uses are over. Never blocks."""
        return all(event.passed() for event in self._events())

    def is_sent(self) -> bool:
        """Is its last broadcast over? Never blocks."""
        return all(event is None or event.passed() for event in (self.arrived, self.sent))

    def synchronize(self) -> None:
        """Block this host thread until the last uses are over."""
        for event in self._events():
            event.synchronize()

    def _events(self) -> list[Completion]:
        events = (self.filled, self.arrived, self.drained, self.sent)
        return [event for event in events if event is not None]


class Ring:
    """`num_buffers` slots of `slot_nbytes` in one allocation, and the streams that use them.

    If a chunk is larger (on a wire that learns sizes late), its slot grows to it, rounded up to a
    multiple of `step_nbytes` or of an eighth of the chunk if that is less. Without `counters`
    nothing is timed. Built and used by one thread.
    """

    def __init__(
        self,
        device: torch.device,
        slot_nbytes: int,
        num_buffers: int,
        counters: Counters | None = None,
        *,
        step_nbytes: int = 1,
    ) -> None:
        self.device = device
        self.is_host = device.type == "cpu"
        # Broadcasts take longest, so copies must not hold them up.
        self.fill, self.drain = Stream(device), Stream(device)
        self.comm = Stream(device, urgent=True)
        self._count(counters)
        self.memory = torch.empty(num_buffers * slot_nbytes, dtype=torch.uint8, device=device)
        if self.is_host:
            _ask_for_huge_pages(self.memory)
        self._after_caller()
        self._slots = [
            Slot(self.memory[i * slot_nbytes : (i + 1) * slot_nbytes]) for i in range(num_buffers)
        ]
        self._step_nbytes = step_nbytes
        self.num_broadcast = 0
        self.num_dry = 0

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def is_free(self, chunk: Carried) -> bool:
        """Whether `take` would return at once; on a CPU."""
        return self._slot_of(chunk).is_free()

    def await_sent(self, chunk: Carried) -> None:
        """Before `take`: block until the next rank has received the slot's last chunk."""
        sent = self._slot_of(chunk).sent
        if sent is not None:
            sent.synchronize()

    def take(self, chunk: Carried) -> Slot:
        """The chunk's slot: streams wait for its last uses, on a CPU the host does."""
        slot = self._slot_of(chunk)
        if self.is_host:
            slot.synchronize()
        if chunk.own is None and slot.memory.numel() < chunk.wire_nbytes:
            slot.synchronize()  # before the allocator may reuse the memory
            slot.replace(torch.empty(0, dtype=torch.uint8, device=self.device))
            eighth = 1 << max(0, (chunk.wire_nbytes // 8).bit_length() - 1)
            nbytes = align_up(chunk.wire_nbytes, min(self._step_nbytes, eighth))
            slot.replace(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
            self._after_caller()
        self.fill.wait(slot.arrived)  # the communication stream recorded it
        self.fill.wait(slot.drained)
        self.comm.wait(slot.drained)
        return slot

    def broadcast(self, chunk: Carried, slot: Slot, broadcast: Broadcast) -> None:
        """Broadcast payload and trailer from the chunk's root, on the communication stream."""
        self.comm.wait(slot.filled)
        with self.comm, self.counters.waiting_on("broadcast"):
            begin = self.comm.begin()
            memory = slot.view(0, chunk.wire_nbytes) if chunk.own is None else chunk.own
            slot.sent = broadcast(memory, chunk.root)
            self.num_broadcast += 1
            slot.arrived = self.comm.record()
        over = slot.sent or slot.arrived
        self.clock.span("broadcast", chunk.index, chunk.nbytes, begin, over)

    def run_dry(
        self, chunks: Sequence[Carried], tokens: int, broadcast: Broadcast, patience_s: float
    ) -> bool:
        """After a failure: take part in the remaining broadcasts, whatever they carry.

        No rank may free memory that a peer's broadcast still reads, so ranks that are alive finish
        all of them; then each of `tokens` ranks broadcasts one byte. Returns False if no broadcast
        ends within `patience_s`.
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
            # Not far ahead: with too many waiting for a dead peer, a launch blocks forever.
            if len(events) > _MAX_DRY:
                if not events.popleft().passes_within(patience_s):
                    return False
                self.num_dry += 1
        return all(event.passes_within(patience_s) for event in events)

    def overwrite(self, byte: int) -> None:
        """Fill the slots, so that nothing of an earlier use is left; before the first chunk."""
        for slot in self._slots:
            slot.memory.fill_(byte)
        self._after_caller()

    def rewind(self, counters: Counters | None = None) -> None:
        """Start another run at chunk 0, counted and timed in `counters` if given."""
        self.synchronize()
        if counters is not self._given:
            self._count(counters)
        self.num_broadcast = 0

    def synchronize(self) -> None:
        """Block until all streams are empty and every stage is counted."""
        for stream in (self.fill, self.comm, self.drain):
            stream.synchronize()
        for slot in self._slots:
            if slot.sent is not None:
                slot.sent.synchronize()
        self.clock.collect(wait=True)

    def is_idle(self) -> bool:
        """Whether all streams are empty. Never blocks."""
        return all(stream.is_idle() for stream in (self.fill, self.comm, self.drain))

    def is_sending(self) -> bool:
        """Is a broadcast under way of which this rank has all bytes? Never blocks."""
        return any(
            not slot.is_sent() and (slot.filled is None or slot.filled.passed())
            for slot in self._slots
        )

    def _count(self, counters: Counters | None) -> None:
        """Count in these from now on; only while the streams are empty."""
        self._given = counters
        self.counters = counters or Counters()
        for stream in (self.fill, self.comm, self.drain):
            stream.timed = counters is not None
        self.clock = StreamTimer(self.device, counters)

    def _after_caller(self) -> None:
        """Make the streams wait for the caller's, where just allocated memory may be in use."""
        for stream in (self.fill, self.comm, self.drain):
            stream.wait_for_caller(self.device)

    def _slot_of(self, chunk: Carried) -> Slot:
        return self._slots[chunk.index % len(self._slots)]
