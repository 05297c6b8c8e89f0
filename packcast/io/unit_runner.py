"""One end's units on their way through its pool: allowed and awaited in order, with their files.

Used by the loop's thread, but `stop` and `close`, which any thread may call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from packcast.errors import PackcastError, TransferError
from packcast.io.files import Resources
from packcast.io.native import NativePool
from packcast.io.pool import CLOSE_LIMIT_S, start_pool
from packcast.io.schedule import Schedule, SpansOf, make_schedule
from packcast.io.staging import Staging, becomes_idle
from packcast.io.work import (
    Failure,
    PoolStopped,
    Task,
    Work,
    make_differences,
    make_digests,
)
from packcast.packed.counters import Counters, Stage
from packcast.packed.plan import Chunk
from packcast.packed.ring import Ring

# How long to wait in one go where there are copies to look after meanwhile, and where not.
LOOK_AFTER_S = 0.0002
_LONG_S = 1.0


class UnitRunner:
    """The schedule of some chunks with its pool, staging and resources, from first to last unit.

    It takes over `staging`, and frees it if it cannot be constructed. `spans_of` is as for
    `make_schedule`; `resources_of` is called after that. `error_of` makes an error of a pool's
    failure. Units are done in order, once `wait` returns.
    """

    def __init__(
        self,
        task: Task,
        stage: Stage,
        chunks: Sequence[Chunk],
        staging: Staging,
        *,
        spans_of: SpansOf,
        resources_of: Callable[[Schedule], Resources],
        error_of: Callable[[Schedule, Failure], PackcastError],
        num_threads: int,
        counters: Counters,
        tolerant: bool = False,
    ) -> None:
        self.num_allowed = self.num_done = 0
        self._num_open = 0  # units whose files are open
        self._staging = staging
        self._stage = stage
        self._counters = counters
        self._error_of = error_of
        self._wanted = 0
        self._closing = threading.Lock()
        self._closed = False
        with ExitStack() as undoing:
            undoing.callback(staging.free, is_idle=True)
            schedule = make_schedule(chunks, staging.unit_nbytes, staging.place, spans_of)
            self.schedule = schedule
            self.units = schedule.units_by_chunk()
            self.digests = make_digests(schedule)
            self.differences = make_differences(schedule, task)
            self._resources = resources = resources_of(schedule)
            resources.hold()
            undoing.callback(resources.let_go)
            work = Work(
                stage,
                task,
                schedule,
                staging.address,
                (staging.memory, resources),
                resources.descriptors,
                self.digests,
                self.differences,
                tolerant,
            )
            self._pool = start_pool(work, num_threads)
            undoing.pop_all()
        counters.follow(stage, self._pool.totals)

    @property
    def native_pool(self) -> NativePool | None:
        """The pool, if it is the compiled one."""
        return self._pool if isinstance(self._pool, NativePool) else None

    def allow(self, num_units: int) -> None:
        """Let the I/O threads at the first `num_units` units, as far as their files can be open."""
        self._wanted = max(self._wanted, min(num_units, len(self.schedule.units)))
        num_allowed = min(self._wanted, self.open_files(self._wanted))
        if num_allowed > self.num_allowed:
            self.num_allowed = num_allowed
            self._pool.allow(num_allowed)

    def open_files(self, num_units: int) -> int:
        """Open the files of the first `num_units` units, as far as they can be open at the same
        time; returns of how many units they are."""
        for unit in self.schedule.units[self._num_open : num_units]:
            if not self._resources.admit(unit, is_next=unit.index == self.num_done):
                break
            self._num_open += 1
        return self._num_open

    def wait(
        self,
        unit: int,
        meanwhile: Callable[[], object] | None = None,
        *,
        every_s: float = LOOK_AFTER_S,
    ) -> None:
        """Block until the units up to this one are done. They must be allowed already, or by
        `meanwhile`, which is called every so often. Raises the failure if they cannot be done."""
        limit_s = _LONG_S if meanwhile is None else every_s
        while self.num_done <= unit:
            while not self._ends_within(self.num_done, limit_s):
                if meanwhile is not None:
                    meanwhile()
            self._retire_next()

    def passes(self, unit: int) -> bool:
        """Whether the units up to this one are done, as `wait` but without blocking."""
        while self.num_done <= unit:
            if not self._ends_within(self.num_done, 0):
                return False
            self._retire_next()
        return True

    def is_done(self, unit: int) -> bool:
        """Whether the unit is done, without waiting or retiring it; raises why it will not be."""
        return self.num_done > unit or self._ends_within(unit, 0)

    def close(self, ring: Ring) -> None:
        """End the I/O threads, and give back files and memory where none is stuck; any thread, any
        number of times."""
        has_ended = self._pool.close(CLOSE_LIMIT_S)
        with self._closing:
            if has_ended and not self._closed:
                self._resources.let_go()
            if not self._closed:
                self._counters.unfollow(self._stage)
            self._closed = self._closed or has_ended
            self._staging.free(is_idle=has_ended and becomes_idle(ring))

    def retire(self, num_units: int) -> None:
        """The first `num_units` units are done, as its caller knows: their files may be closed."""
        while self.num_done < num_units:
            self._resources.retire(self.schedule.units[self.num_done])
            self.num_done += 1

    def error_of(self, stopped: PoolStopped) -> PackcastError:
        """Why a unit will not be done."""
        if stopped.failure is None:
            return TransferError("the transfer is over")
        return self._error_of(self.schedule, stopped.failure)

    def _ends_within(self, unit: int, limit_s: float) -> bool:
        try:
            return self._pool.wait(unit, limit_s)
        except PoolStopped as stopped:
            raise self.error_of(stopped) from None

    def _retire_next(self) -> None:
        self.retire(self.num_done + 1)
        if self.num_allowed < self._wanted:
            self.allow(self._wanted)
