"""Bare I/O threads around a raw broadcast, chunk by chunk: read, copied, sent, copied, written.

What together.py measures. Of packcast there are the schedule and the I/O threads, which hash
nothing here; not its loop, its trailers, its proofs. Kept apart from them on purpose.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch

from packcast.bench.team import Team
from packcast.errors import PackcastError
from packcast.io.pinned import PinnedMemory
from packcast.io.pool import CLOSE_LIMIT_S, start_pool
from packcast.io.schedule import Schedule, SpansOf, make_schedule
from packcast.io.work import FailureKind, PoolStopped, Task, Work, make_differences, make_digests
from packcast.packed.plan import Chunk, unit_nbytes

Free = Callable[..., object]

_LOOK_AFTER_S = 0.0002
_NUM_SYNC_THREADS = 8


class Threads:
    """The bare I/O threads of one end, and their units by chunk."""

    def __init__(
        self,
        task: Task,
        schedule: Schedule,
        memory: torch.Tensor,
        descriptors: array[int],
        num_threads: int,
    ) -> None:
        self.units = schedule.units_by_chunk()
        self.num_units = len(schedule.units)
        self.memory = memory
        self.differences = make_differences(schedule, task)
        work = Work(
            "limit",
            task,
            schedule,
            memory.data_ptr(),
            memory,
            descriptors,
            make_digests(schedule),
            self.differences,
            hashed=False,
        )
        self._pool = start_pool(work, num_threads)
        self.allow = self._pool.allow

    def is_done(self, unit: int) -> bool:
        return self._wait(unit, 0)

    def wait(self, unit: int, meanwhile: Callable[[], object]) -> None:
        """Block until the unit is done, and call `meanwhile` now and then."""
        meanwhile()
        while not self._wait(unit, _LOOK_AFTER_S):
            meanwhile()

    def close(self) -> bool:
        return self._pool.close(CLOSE_LIMIT_S)

    def _wait(self, unit: int, timeout_s: float) -> bool:
        try:
            return self._pool.wait(unit, timeout_s)
        except PoolStopped as stopped:
            failure = stopped.failure
            ended = failure is not None and failure.kind is FailureKind.END_OF_FILE
            reason = "a file has ended early" if ended else failure.reason if failure else "stopped"
            raise PackcastError(f"an I/O thread failed: {reason}") from stopped


class Loop:
    """The chunks in their order on one rank: `fill`, the broadcast, `drain`.

    `mine` are those that it reads. `target` is memory that they land in, `written` are descriptors
    to sync at the end.
    """

    def __init__(
        self,
        team: Team,
        num_buffers: int,
        buffer_size: int,
        mine: Sequence[Chunk],
        *,
        target: torch.Tensor | None = None,
        written: Sequence[int] = (),
    ) -> None:
        self.team = team
        self.num_slots = num_buffers
        self.slot_nbytes = self.unit_nbytes = buffer_size
        nbytes = num_buffers * buffer_size
        self.memory = torch.zeros(nbytes, dtype=torch.uint8, device=team.device)
        self.mine = mine
        self.target = target
        self.reading: Threads | None = None
        self.writing: Threads | None = None
        self._written = written

    def slot(self, chunk: Chunk) -> torch.Tensor:
        begin = chunk.index % self.num_slots * self.slot_nbytes
        return self.memory[begin : begin + chunk.nbytes]

    def start(
        self,
        task: Task,
        chunks: Sequence[Chunk],
        spans_of: SpansOf,
        descriptors: array[int],
        num_threads: int,
        ending: ExitStack,
    ) -> Threads:
        """The I/O threads of one end, until `ending`."""
        memory, free = self.host_memory()
        schedule = make_schedule(chunks, self.unit_nbytes, self.place, spans_of)
        threads = Threads(task, schedule, memory, descriptors, num_threads)
        ending.callback(lambda: free(is_idle=threads.close()))
        return threads

    def host_memory(self) -> tuple[torch.Tensor, Free]:
        """Where one end's units are, and how to give it back."""
        return self.memory, lambda *, is_idle: None

    def place(self, chunk: Chunk, unit: int) -> int:
        """Where in it a unit lies: here in the chunk's slot."""
        return chunk.index % self.num_slots * self.slot_nbytes

    def run(self, chunks: Sequence[Chunk]) -> Exception | None:
        """Where this rank fails it goes on with the broadcasts alone: the others wait for them."""
        failure = _failure_of(self.pass_on)
        for chunk in chunks:
            failure = failure or _failure_of(partial(self.fill, chunk))
            self.broadcast(chunk)
            failure = failure or _failure_of(partial(self.drain, chunk))
        failure = failure or _failure_of(self.finish)
        self.team.synchronize()
        return failure

    def check(self) -> None:
        """Afterwards: what was compared must be the same."""
        if self.writing is not None and max(self.writing.differences) >= 0:
            raise PackcastError("other bytes arrive than were read")

    def fill(self, chunk: Chunk) -> None:
        """Have the chunk's bytes in its slot, on the root; elsewhere have the slot free."""
        raise NotImplementedError

    def broadcast(self, chunk: Chunk) -> None:
        self.team.broadcast(self.slot(chunk), chunk.root)

    def drain(self, chunk: Chunk) -> None:
        """The chunk has been given to the broadcast: let it go where it belongs."""
        raise NotImplementedError

    def finish(self) -> None:
        """Until all is written, and durable."""
        if self.writing is not None:
            for unit in range(self.writing.num_units):  # they end in any order
                self.writing.wait(unit, self.pass_on)
        with ThreadPoolExecutor(_NUM_SYNC_THREADS) as pool:
            list(pool.map(os.fsync, self._written))

    def pass_on(self) -> None:
        """Allow what may be done by now."""


class HostLoop(Loop):
    """On a CPU I/O threads read into the slots, and write from them."""

    _num_broadcast = 0
    _num_allowed = 0

    def fill(self, chunk: Chunk) -> None:
        if self.reading is not None and chunk.root == self.team.rank:
            self.reading.wait(self.reading.units[chunk.index][-1].index, self.pass_on)
        elif self.writing is not None and chunk.index >= self.num_slots:
            self.writing.wait(chunk.index - self.num_slots, self.pass_on)

    def drain(self, chunk: Chunk) -> None:
        self._num_broadcast = chunk.index + 1
        if self.writing is not None:
            self.writing.allow(self._num_broadcast)
        self.pass_on()

    def pass_on(self) -> None:
        while self.reading is not None and self._num_allowed < len(self.mine):
            before = self.mine[self._num_allowed].index - self.num_slots
            if before >= self._num_broadcast:
                return
            if before >= 0 and self.writing is not None and not self.writing.is_done(before):
                return
            self._num_allowed += 1
            self.reading.allow(self._num_allowed)


class DeviceLoop(Loop):
    """Beside a GPU: pinned staging on both sides, and three streams that wait for each other."""

    def __init__(
        self,
        team: Team,
        num_buffers: int,
        buffer_size: int,
        mine: Sequence[Chunk],
        *,
        target: torch.Tensor | None,
        written: Sequence[int],
        staging_nbytes: int,
    ) -> None:
        super().__init__(team, num_buffers, buffer_size, mine, target=target, written=written)
        self._at = 0  # in the target
        self.unit_nbytes = unit_nbytes(buffer_size)
        self.num_places = max(2, staging_nbytes // self.unit_nbytes)
        self._in, self._out = torch.cuda.Stream(team.device), torch.cuda.Stream(team.device)
        self._comm = torch.cuda.Stream(team.device, priority=-1)
        self._arrived: list[torch.cuda.Event | None] = [None] * self.num_slots
        self._drained: list[torch.cuda.Event | None] = [None] * self.num_slots
        self._copied_in: deque[torch.cuda.Event] = deque()
        self._copied_out: deque[torch.cuda.Event] = deque()
        self._num_in = self._num_out = 0

    def host_memory(self) -> tuple[torch.Tensor, Free]:
        staging = PinnedMemory(self.num_places * self.unit_nbytes)
        return staging.tensor, staging.close

    def place(self, chunk: Chunk, unit: int) -> int:
        return unit % self.num_places * self.unit_nbytes

    def fill(self, chunk: Chunk) -> None:
        at = chunk.index % self.num_slots
        arrived, drained = self._arrived[at], self._drained[at]
        if chunk.root != self.team.rank or self.reading is None:
            if drained is not None:
                self._comm.wait_event(drained)
            if arrived is not None:
                arrived.synchronize()  # or the host would run ahead for good
            return
        slot, event = self.slot(chunk), None
        with torch.cuda.stream(self._in):
            for before in (arrived, drained):
                if before is not None:
                    self._in.wait_event(before)
            for unit in self.reading.units[chunk.index]:
                self.reading.wait(unit.index, self.pass_on)
                nbytes = min(unit.nbytes, chunk.nbytes - unit.slot_offset)
                begin = unit.memory_offset
                slot[unit.slot_offset : unit.slot_offset + nbytes].copy_(
                    self.reading.memory[begin : begin + nbytes], non_blocking=True
                )
                event = self._in.record_event()
                self._copied_in.append(event)
        if event is not None:
            self._comm.wait_event(event)

    def broadcast(self, chunk: Chunk) -> None:
        with torch.cuda.stream(self._comm):
            super().broadcast(chunk)
            self._arrived[chunk.index % self.num_slots] = self._comm.record_event()

    def drain(self, chunk: Chunk) -> None:
        at = chunk.index % self.num_slots
        arrived, slot = self._arrived[at], self.slot(chunk)
        assert arrived is not None, "it was given to the stream just now"
        with torch.cuda.stream(self._out):
            if self.target is not None:
                self._out.wait_event(arrived)
                self.target[self._at : self._at + chunk.nbytes].copy_(slot, non_blocking=True)
                self._at += chunk.nbytes
                self._drained[at] = self._out.record_event()
            elif self.writing is not None:
                self._out.wait_event(arrived)
                for unit in self.writing.units[chunk.index]:
                    if unit.index >= self.num_places:
                        self.writing.wait(unit.index - self.num_places, self.pass_on)
                    nbytes = min(unit.nbytes, chunk.nbytes - unit.slot_offset)
                    begin = unit.memory_offset
                    self.writing.memory[begin : begin + nbytes].copy_(
                        slot[unit.slot_offset : unit.slot_offset + nbytes], non_blocking=True
                    )
                    self._drained[at] = event = self._out.record_event()
                    self._copied_out.append(event)
        self.pass_on()

    def pass_on(self) -> None:
        while self._copied_in and self._copied_in[0].query():
            self._copied_in.popleft()
            self._num_in += 1
        while self._copied_out and self._copied_out[0].query():
            self._copied_out.popleft()
            self._num_out += 1
        if self.reading is not None:
            self.reading.allow(min(self._num_in + self.num_places, self.reading.num_units))
        if self.writing is not None:
            self.writing.allow(self._num_out)


def _failure_of(step: Callable[[], object]) -> Exception | None:
    try:
        step()
    except Exception as error:
        return error
    return None
