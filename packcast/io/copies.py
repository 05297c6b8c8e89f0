"""The way from staging into slots on a GPU: each unit is copied as soon as it was read, and more
are read into its place as soon as the copy is over.

With the compiled pool all of that is one call for a chunk, in which the interpreter is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from packcast.io.native import CopyDriver, DeviceFailed, NativeCopies, NativePool, cuda_driver
from packcast.io.schedule import ScheduledUnit
from packcast.io.staging import Staging
from packcast.io.unit_runner import LOOK_AFTER_S, UnitRunner
from packcast.io.work import PoolStopped
from packcast.packed.counters import Stage
from packcast.packed.ring import Ring, Slot
from packcast.packed.streams import StreamEvent

LOOK_EVERY_S = 0.02
_ENOUGH_FOR_S = 0.0006  # half the default staging, at 50 GB/s three times as long

# Called now and then while the loop waits for a stage.
Look = Callable[[Stage], object]


class Copies(Protocol):
    """Gives the units of chunks to the ring's fill stream, which is the current one, in order."""

    def copy(
        self,
        units: Sequence[ScheduledUnit],
        slot: Slot,
        before_last: Callable[[], object],
        look: Look,
    ) -> StreamEvent:
        """All units of the next chunk; `before_last` is called between the time when the last one
        was read and its copy, `look` while it waits. Returns an event before the first copy."""


def make_copies(runner: UnitRunner, staging: Staging, ring: Ring) -> Copies:
    """The fastest there is for the runner's pool and the ring's device."""
    pool, driver = runner.native_pool, cuda_driver()
    if pool is None or driver is None:
        return LoopCopies(runner, staging, ring)
    return PoolCopies(pool, driver, runner, staging, ring)


class PoolCopies:
    """Begun by the compiled pool, in this thread."""

    def __init__(
        self,
        pool: NativePool,
        driver: CopyDriver,
        runner: UnitRunner,
        staging: Staging,
        ring: Ring,
    ) -> None:
        self._runner = runner
        self._ring = ring
        self._num_places = staging.num_units
        # Kept: they are recorded again and again.
        self._events = [ring.fill.untimed() for _ in range(staging.num_units)]
        handles = [event.handle for event in self._events]
        self._native = NativeCopies(pool, runner.schedule, driver, ring.fill.handle, handles)

    def copy(
        self,
        units: Sequence[ScheduledUnit],
        slot: Slot,
        before_last: Callable[[], object],
        look: Look,
    ) -> StreamEvent:
        last, address = units[-1].index, slot.memory.data_ptr()
        # Torch's own call: from here on the device's context is this thread's.
        begin = self._ring.fill.record()
        self._native.record_before_next(begin.handle)
        self._copy(last, last, address, look)
        before_last()
        self._copy(last + 1, last, address, look)
        self._runner.retire(self._native.num_begun)
        return begin

    def _copy(self, end: int, until: int, slot: int, look: Look) -> None:
        if self._passes(end, until, slot, 0):
            return
        is_placed = self._native.num_begun < self._native.num_free
        # A unit without a place waits for staging: all slots wait for a copy to the device.
        stage: Stage = "read" if is_placed else "h2d"
        with self._ring.counters.waiting_on(stage):
            look(stage)
            while not self._passes(end, until, slot, LOOK_EVERY_S):
                look(stage)

    def _passes(self, end: int, until: int, slot: int, timeout_s: float) -> bool:
        runner, native = self._runner, self._native
        runner.retire(native.num_begun)
        num_ready = runner.open_files(max(end, until + 1) + self._num_places)
        try:
            return native.copy(end, until, slot, timeout_s, num_ready=num_ready)
        except PoolStopped as stopped:
            raise runner.error_of(stopped) from None
        except DeviceFailed as failed:
            torch.cuda.check_error(failed.code)
            raise


class LoopCopies:
    """Begun by torch, with any pool."""

    def __init__(self, runner: UnitRunner, staging: Staging, ring: Ring) -> None:
        self._runner = runner
        self._staging = staging
        self._ring = ring
        self._under_way: deque[StreamEvent] = deque()
        self._num_over = 0

    def copy(
        self,
        units: Sequence[ScheduledUnit],
        slot: Slot,
        before_last: Callable[[], object],
        look: Look,
    ) -> StreamEvent:
        begin: StreamEvent | None = None
        for unit in units:
            self._wait(unit, look)
            if unit.is_last:
                before_last()
            begin = begin or self._ring.fill.record()
            self._staging.copy_to(slot, unit)
            self._under_way.append(self._ring.fill.record())
        assert begin is not None, "a chunk has units"
        return begin

    def _wait(self, unit: ScheduledUnit, look: Look) -> None:
        self._reuse_staging()
        if self._runner.passes(unit.index):
            return
        # As in PoolCopies.
        stage: Stage = "read" if unit.index < self._runner.num_allowed else "h2d"

        def meanwhile() -> None:
            self._reuse_staging()
            look(stage)

        # With half the staging ahead the I/O threads have work; looking costs the loop time.
        has_enough = self._runner.num_allowed - unit.index > self._staging.num_units // 2
        every_s = _ENOUGH_FOR_S if has_enough else LOOK_AFTER_S
        with self._ring.counters.waiting_on(stage):
            look(stage)
            self._runner.wait(unit.index, meanwhile, every_s=every_s)

    def _reuse_staging(self) -> None:
        """Have more units read in the place of those whose copies are over."""
        while self._under_way and self._under_way[0].passed():
            self._under_way.popleft()
            self._num_over += 1
        self._runner.allow(self._num_over + self._staging.num_units)
