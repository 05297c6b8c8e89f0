"""Host memory between files and slots: pinned beside a GPU, the slot itself on a CPU.

Both are lent in pieces, by chunk and place in its slot, in chunk order, once there is room.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from packcast.errors import PackcastError, TransferError
from packcast.packed.lanes import Mark
from packcast.packed.plan import Chunk, piece_nbytes, staging_count, trailer_nbytes
from packcast.packed.ring import Ring, Slot, host_view
from packcast.units import format_size

CLOSE_LIMIT_S = 1.0  # for threads at the end: after a failure some may be stuck in I/O

_used = threading.local()


def use_device(device: torch.device) -> None:
    """Make a GPU this thread's own: its first call into CUDA would make a context on GPU 0."""
    if device.type == "cuda" and not hasattr(_used, "device"):
        torch.cuda.set_device(device)
        _used.device = device


def join_all(threads: Sequence[threading.Thread], limit_s: float) -> bool:
    """Wait for the threads to end, `limit_s` for all of them together; True if they did."""
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


@dataclass(frozen=True, slots=True)
class Buffers:
    """What both ends of a rank share, and the share of pinned memory that each of them may take."""

    ring: Ring
    buffer_size: int
    staging_nbytes: int
    tag: bytes


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
    """`count` pinned buffers of `nbytes`, made once; the bound on this rank's pinned memory."""

    def __init__(self, nbytes: int, count: int) -> None:
        try:
            self._memory = [
                torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(count)
            ]
        except RuntimeError as error:
            raise TransferError(
                f"this host cannot pin {format_size(nbytes * count)} of memory",
                hint="choose less with --staging on the sender",
            ) from error
        self._free: deque[tuple[torch.Tensor, memoryview, Mark | None]] = deque(
            (tensor, host_view(tensor), None) for tensor in self._memory
        )
        self._changed = threading.Condition()
        self._closed_by: PackcastError | None = None
        self.pinned_nbytes = count << (nbytes - 1).bit_length()

    def lease(self, chunk: Chunk, offset: int, nbytes: int) -> Lease:
        """Any free buffer's first `nbytes`; blocks until there is one and its last copy is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed_by or self._free)
            if self._closed_by:
                raise self._closed_by
            tensor, view, after = self._free.popleft()
        if after is not None:
            after.synchronize()

        def give_back(mark: Mark | None) -> None:
            with self._changed:
                self._free.append((tensor, view, mark))
                self._changed.notify()

        return Lease(tensor[:nbytes], view[:nbytes], False, give_back)

    def close(self, error: PackcastError) -> None:
        """Wake everyone who waits for a buffer with `error`; the first one counts."""
        with self._changed:
            self._closed_by = self._closed_by or error
            self._changed.notify_all()


class SlotStaging:
    """On a CPU: the place in the slot itself, lent once the slot belongs to the chunk."""

    pinned_nbytes = 0

    def __init__(self, ring: Ring) -> None:
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


Staging = PinnedStaging | SlotStaging


def make_staging(buffers: Buffers) -> tuple[Staging, Staging]:
    """Staging for pieces and for trailers; beside a GPU it is pinned here, once."""
    ring = buffers.ring
    if ring.is_host:
        return SlotStaging(ring), SlotStaging(ring)
    count = staging_count(buffers.buffer_size, buffers.staging_nbytes)
    return (
        PinnedStaging(piece_nbytes(buffers.buffer_size), count),
        PinnedStaging(trailer_nbytes(buffers.buffer_size), count),
    )
