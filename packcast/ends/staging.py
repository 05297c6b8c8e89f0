"""Host memory between files and slots: pinned beside a GPU, the slot itself on a CPU.

Both are lent in units, by chunk and place in its slot, in chunk order, once there is room.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from packcast.ends.arena import Arena
from packcast.ends.hands import CLOSE_LIMIT_S, Hands, ProcessHands, ThreadHands
from packcast.errors import PackcastError
from packcast.packed.lanes import Mark
from packcast.packed.plan import Chunk, pinned_nbytes, staged_nbytes, unit_nbytes
from packcast.packed.ring import Ring, Slot, host_view

_used = threading.local()


def use_device(device: torch.device) -> None:
    """Make a GPU this thread's own: its first call into CUDA would make a context on GPU 0."""
    if device.type == "cuda" and not hasattr(_used, "device"):
        torch.cuda.set_device(device)
        _used.device = device


@dataclass(frozen=True, slots=True)
class Buffers:
    """What both ends of a rank share, and the share of pinned memory that each of them may take.

    With `helpers` the ends' work is done by processes. On a CPU they need the slots to lie in
    shared memory: `slots`.
    """

    ring: Ring
    buffer_size: int
    staging_nbytes: int
    tag: bytes
    helpers: bool = False
    slots: Arena | None = None


class Lease:
    """Host memory lent until `release`; `view` is its bytes, `tensor` the same for copies."""

    __slots__ = ("_give_back", "in_slot", "tensor", "view")

    def __init__(
        self,
        tensor: torch.Tensor,
        view: memoryview,
        in_slot: bool,
        give_back: Callable[[Mark | None], None],
    ) -> None:
        self.tensor = tensor
        self.view = view
        self.in_slot = in_slot
        self._give_back = give_back

    def copy_to(self, slot: Slot, offset: int) -> None:
        """Give the copy into the slot to the current lane; on a CPU there is none to make."""
        if not self.in_slot:
            slot.memory[offset : offset + len(self.view)].copy_(self.tensor, non_blocking=True)

    def copy_from(self, slot: Slot, offset: int) -> None:
        """Give the copy out of the slot to the current lane; on a CPU there is none to make."""
        if not self.in_slot:
            self.tensor.copy_(slot.memory[offset : offset + len(self.view)], non_blocking=True)

    def release(self, after: Mark | None = None) -> None:
        """Give the memory back; it is lent again once `after` has passed."""
        self._give_back(after)


class PinnedStaging:
    """Buffers of `nbytes`, cut from one arena: the bound on this end's pinned memory."""

    def __init__(self, arena: Arena, nbytes: int, unit_nbytes: int) -> None:
        self.arena = arena
        self.unit_nbytes = unit_nbytes
        self.pinned_nbytes = arena.pinned_nbytes
        begins = range(0, arena.nbytes - nbytes + 1, nbytes)
        self._free = [_Buffer(arena, begin, nbytes) for begin in reversed(begins)]
        self._in_use: deque[tuple[_Buffer, Mark]] = deque()  # by copies, in the lane's order
        self._changed = threading.Condition()
        self._closed_by: PackcastError | None = None

    def lease(self, chunk: Chunk, offset: int, nbytes: int) -> Lease:
        """Any free buffer's first `nbytes`; blocks until there is one and its last copy is over."""
        buffer, after = self._take()
        if after is not None:
            after.synchronize()

        def give_back(mark: Mark | None) -> None:
            with self._changed:
                if mark is None:
                    self._free.append(buffer)
                else:
                    self._in_use.append((buffer, mark))
                self._changed.notify()

        return Lease(buffer.tensor[:nbytes], buffer.view[:nbytes], False, give_back)

    def close(self, error: PackcastError) -> None:
        """Wake everyone who waits for a buffer with `error`; the first one counts."""
        with self._changed:
            self._closed_by = self._closed_by or error
            self._changed.notify_all()

    def free(self, ring: Ring) -> None:
        """Nobody wants a buffer any more: unpin them, unless copies of a broken transfer hang."""
        deadline = time.monotonic() + CLOSE_LIMIT_S
        while not ring.is_idle() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.arena.close(is_idle=ring.is_idle())

    def _take(self) -> tuple[_Buffer, Mark | None]:
        with self._changed:
            self._changed.wait_for(lambda: self._closed_by or self._free or self._in_use)
            if self._closed_by:
                raise self._closed_by
            while self._in_use and self._in_use[0][1].passed():
                self._free.append(self._in_use.popleft()[0])
            if self._free:
                return self._free.pop(), None  # the newest one: its lines are still in the cache
            return self._in_use.popleft()


class _Buffer:
    __slots__ = ("tensor", "view")

    def __init__(self, arena: Arena, begin: int, nbytes: int) -> None:
        self.tensor = arena.tensor[begin : begin + nbytes]
        self.view = arena.view[begin : begin + nbytes]


class SlotStaging:
    """On a CPU: the place in the slot itself, lent once the slot belongs to the chunk."""

    pinned_nbytes = 0

    def __init__(self, ring: Ring, unit_nbytes: int) -> None:
        self.unit_nbytes = unit_nbytes
        self._ring = ring

    def lease(self, chunk: Chunk, offset: int, nbytes: int) -> Lease:
        """The slot's bytes from `offset`; blocks until the slot's former use is over."""
        slot = self._ring.await_turn(chunk)
        self._ring.hold(slot)
        tensor = slot.memory[offset : offset + nbytes]
        return Lease(tensor, host_view(tensor), True, lambda _: self._ring.let_go(slot))

    def close(self, error: PackcastError) -> None:
        """Wake everyone who waits for a slot with `error`; the first one counts."""
        self._ring.stop(error)

    def free(self, ring: Ring) -> None:
        """The slots are the ring's."""


Staging = PinnedStaging | SlotStaging


def make_staging(buffers: Buffers) -> Staging:
    """Staging for one end; beside a GPU it is pinned here, once."""
    size = buffers.buffer_size
    if buffers.ring.is_host:
        return SlotStaging(buffers.ring, size)
    arena = Arena(pinned_nbytes(size, buffers.staging_nbytes), is_pinned=True)
    return PinnedStaging(arena, staged_nbytes(size), unit_nbytes(size))


def make_hands(buffers: Buffers, staging: Staging, num_hands: int, name: str) -> Hands:
    """Who does one end's reading, checking and writing in that staging."""
    if not buffers.helpers:
        return ThreadHands(num_hands, name)
    arena = buffers.slots if isinstance(staging, SlotStaging) else staging.arena
    assert arena is not None, "helpers need memory that they can map"
    try:
        return ProcessHands(arena, num_hands, name)
    except BaseException:
        staging.free(buffers.ring)  # nobody else will; and pinned memory must not be unmapped
        raise
