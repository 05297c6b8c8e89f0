"""One end's units on their way through its pool: allowed and awaited in order, with their files.

Used by the loop's thread, but `stop` and `close`, which any thread may call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from packcast.errors import PackcastError, TransferError
from packcast.io.files import Resources
from packcast.io.pool import CLOSE_LIMIT_S, start_pool
from packcast.io.schedule import Schedule
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
from packcast.packed.ring import Ring

# How long to wait in one go where there are copies to look after meanwhile, and where not.
_LOOK_AFTER_S = 0.0002
_LONG_S = 1.0


class UnitRunner:
    """A schedule's pool, staging and resources, from the first unit to the last.

    `error_of` puts a failure of the pool into words. A unit is done when `wait` says so, in order.
    """

    def __init__(
        self,
        task: Task,
        stage: Stage,
        schedule: Schedule,
        staging: Staging,
        resources: Resources,
        *,
        num_threads: int,
        counters: Counters,
        error_of: Callable[[Failure], PackcastError],
        tolerant: bool = False,
    ) -> None:
        self.schedule = schedule
        self.digests = make_digests(schedule)
        self.differences = make_differences(schedule, task)
        self.num_allowed = self.num_done = 0
        self._stage = stage
        self._staging = staging
        self._resources = resources
        self._counters = counters
        self._error_of = error_of
        self._wanted = 0
        self._closing = threading.Lock()
        self._closed = False
        resources.hold()
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
        try:
            self._pool = start_pool(work, num_threads)
        except BaseException:
            resources.let_go()
            raise
        counters.follow(stage, self._pool.totals)

    def allow(self, num_units: int) -> None:
        """Let the I/O threads at the first `num_units` units, as far as their files can be open."""
        self._wanted = max(self._wanted, min(num_units, len(self.schedule.units)))
        self._admit()

    def wait(self, unit: int, meanwhile: Callable[[], object] | None = None) -> None:
        """Block until the units up to this one are done, which must have been allowed, or be by
        `meanwhile`, which is called now and then. Raises why they will not be."""
        limit_s = _LONG_S if meanwhile is None else _LOOK_AFTER_S
        while self.num_done <= unit:
            while not self._ends_within(self.num_done, limit_s):
                if meanwhile is not None:
                    meanwhile()
            self._resources.retire(self.schedule.units[self.num_done])
            self.num_done += 1
            if self.num_allowed < self._wanted:
                self._admit()

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

    def _ends_within(self, unit: int, limit_s: float) -> bool:
        try:
            return self._pool.wait(unit, limit_s)
        except PoolStopped as stopped:
            if stopped.failure is None:
                raise TransferError("the transfer is over") from None
            raise self._error_of(stopped.failure) from None

    def _admit(self) -> None:
        begin = self.num_allowed
        for index in range(begin, self._wanted):
            is_next = index == self.num_done
            if not self._resources.admit(self.schedule.units[index], is_next=is_next):
                break
            self.num_allowed = index + 1
        if self.num_allowed > begin:
            self._pool.allow(self.num_allowed)
