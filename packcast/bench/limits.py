"""What the hardware does without packcast: one stage alone, or all stages of a row at once.

Nothing is planned or verified: I/O threads read files into memory and write memory to files beside
copies and raw broadcasts. Each stage moves as many bytes as in the row, on the same ranks, with the
row's threads and block sizes. The stages do not wait for each other, and nothing is hashed, but in
every other run beside a GPU: there the copies follow the reads, and what is read is hashed, as in a
pipeline, since reads that run ahead in bursts take memory's bandwidth from the copies. Measured in
turn with the rows; the best run counts.
"""

from __future__ import annotations

import errno
import os
import shutil
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from packcast.bench.dataset import offer_of_case
from packcast.bench.methods import MethodRun, RunFailed, fill_with_poison
from packcast.bench.model import SENDER, LimitStage
from packcast.bench.pagecache import evict
from packcast.bench.residentmethods import carry_all
from packcast.io import syscalls
from packcast.io.pinned import PinnedMemory
from packcast.io.pool import CLOSE_LIMIT_S, start_pool
from packcast.io.schedule import IN_MEMORY, ScheduledUnit, Span, SpansOf, make_schedule
from packcast.io.work import (
    FailureKind,
    Pool,
    PoolStopped,
    Task,
    Work,
    make_differences,
    make_digests,
)
from packcast.packed.chain import Chain
from packcast.packed.plan import PAGE, Chunk, Extent, staging_count, unit_nbytes
from packcast.transfer.host_share import num_io_threads, staging_bound
from packcast.transfer.offer import Offer

_LONG_S = 1.0
_NUM_SYNC_THREADS = 8
_FEW_UNITS = 4  # of staging: they stay in the processor's cache


class LimitMethod(MethodRun):
    """The stages that `case.limit` names.

    Broadcasts use `_memory`, as many slots as the row has buffers. Files are read to and written
    from `_host`: the same memory, or pinned memory beside a GPU. With the sink `land` bytes are
    copied to `_target` on the device.
    """

    _memory: torch.Tensor
    _host: torch.Tensor
    _target: torch.Tensor | None = None
    _chain: Chain | None = None
    _reads: _PacedReads | None = None  # that keep step with the copies
    _is_idle = True
    _written: Sequence[int] = ()

    def prepare(self) -> None:
        case, ranks = self.case, self.ranks
        self._pools: list[tuple[Pool, int]] = []  # with their units
        nbytes = case.num_buffers * case.buffer_size
        self.check_room(nbytes)
        memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=ranks.device)
        self._host = self._memory = memory[-memory.data_ptr() % PAGE :][:nbytes]  # as packcast's
        if case.source == "resident":
            return
        offer = offer_of_case(self.data, case, ranks)
        if ranks.on_gpu:
            num_units = staging_count(case.buffer_size, staging_bound(offer))
            if case.limit != "together":
                num_units = min(num_units, _FEW_UNITS)
            staging = PinnedMemory(num_units * unit_nbytes(case.buffer_size))
            self.resources.callback(lambda: staging.close(is_idle=self._is_idle))
            self._host = staging.tensor
        sink = "discard" if ranks.is_sender else case.sink
        if sink == "land" and case.limit == "together":
            self._target = torch.empty(offer.nbytes, dtype=torch.uint8, device=ranks.device)
        # Reading stands for comparing, which takes no time beside it.
        compares = sink == "verify" and case.limit == "together"
        if compares or (self._has("read") and ranks.rank in self.readers):
            self._start_reading(offer, everything=compares)
        if self._has("write") and sink == "write":
            self._start_writing(offer)
        elif self._target is not None and not ranks.on_gpu:
            threads = num_io_threads(offer.assignment.ranks_on_host)
            spans = _spans_in(self._target)
            self._start(Task.WRITE, offer.chunks(), spans, array("i"), threads)

    def connect(self) -> None:
        """Over gloo every other run uses a chain of ranks: the faster one is the limit."""
        if not self.ranks.on_gpu and self._has("broadcast") and self.turn % 2 == 0:
            self._chain = self.open_chain(self._roots())

    def poison(self) -> None:
        """Also touches every page of the memory, as packcast's rows do."""
        fill_with_poison(self._memory, self._host)
        if self._target is not None:
            fill_with_poison(self._target)

    def run(self) -> None:
        for pool, num_units in self._pools:
            if self._reads is None or pool is not self._reads.pool:
                pool.allow(num_units)
        if self.ranks.on_gpu:
            self._copy_and_broadcast()
            if self._reads is not None:
                self._reads.allow_rest()
        elif self._chain is not None:
            carry_all(self._chain, list(self._calls()), self.case.num_buffers)
        elif self._has("broadcast"):
            for slot, root in self._calls():
                self.ranks.broadcast(slot, root)
        # After the broadcasts: a failure leaves no other rank waiting.
        try:
            for pool, num_units in self._pools:
                for unit in range(num_units):
                    while not pool.wait(unit, _LONG_S):
                        pass
            with ThreadPoolExecutor(_NUM_SYNC_THREADS) as threads:
                list(threads.map(os.fsync, self._written))
        except PoolStopped as stopped:
            failure = stopped.failure
            ended = failure is not None and failure.kind is FailureKind.END_OF_FILE
            reason = "a file has ended early" if ended else failure.reason if failure else "stopped"
            raise RunFailed(f"an I/O thread failed: {reason}") from stopped
        except OSError as error:
            raise RunFailed(f"cannot write {self.write_folder}: {error.strerror}") from error

    def check(self) -> int:
        """The bytes are random."""
        return 0

    def _has(self, stage: LimitStage) -> bool:
        return self.case.limit in ("together", stage)

    def _roots(self) -> Sequence[int]:
        return self.readers if self.case.source == "file" else (SENDER,)

    def _calls(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The broadcasts, each with its slot and root; readers take turns."""
        case, nbytes, roots = self.case, self.nbytes, self._roots()
        slots = self._memory.split(case.buffer_size)
        for i, begin in enumerate(range(0, nbytes, case.buffer_size)):
            size = min(case.buffer_size, nbytes - begin)
            yield slots[i % len(slots)][:size], roots[i % len(roots)]

    def _copy_and_broadcast(self) -> None:
        """On a GPU: each stage on its own stream, at most as many chunks ahead as buffers."""
        ranks, case = self.ranks, self.case
        stages = [stage for stage in ("h2d", "broadcast") if case.limit in ("together", stage)]
        if not ranks.is_sender and self._has("d2h") and case.sink in ("write", "verify"):
            stages.append("d2h")
        if self._target is not None:
            stages.append("land")
        streams = {
            stage: torch.cuda.Stream(ranks.device, priority=-(stage == "broadcast"))
            for stage in stages
        }
        in_flight: deque[torch.cuda.Event] = deque()
        landed = 0
        for slot, root in self._calls():
            for stage, stream in streams.items():
                with torch.cuda.stream(stream):
                    if stage == "broadcast":
                        ranks.broadcast(slot, root)
                    elif stage == "land":
                        assert self._target is not None
                        landing = self._target[landed : landed + slot.numel()]
                        landing.copy_(slot[: landing.numel()], non_blocking=True)
                        landed += slot.numel()
                    elif stage == "d2h" or root == ranks.rank:
                        for part in slot.split(unit_nbytes(case.buffer_size)):
                            host = self._host[: part.numel()]
                            if stage == "h2d" and self._reads is not None:
                                self._reads.copy(part, stream)
                            elif stage == "h2d":
                                part.copy_(host, non_blocking=True)
                            else:
                                host.copy_(part, non_blocking=True)
                    in_flight.append(stream.record_event())
            while len(in_flight) > case.num_buffers * len(streams):
                in_flight.popleft().synchronize()
        ranks.synchronize()

    def _start_reading(self, offer: Offer, *, everything: bool) -> None:
        paths = {file.name: file.path for file in self.data.opened().files}
        wanted = [paths[spec.name] for spec in offer.files]
        if self.cold:
            evict(wanted)
        chunks = [c for c in offer.chunks() if everything or c.root == self.ranks.rank]
        sharing = offer.assignment.ranks_on_host if everything else offer.assignment.readers_on_host
        descriptors = self._open(wanted, os.O_RDONLY)
        threads = num_io_threads(sharing)
        paced = self.ranks.on_gpu and not everything and self._has("h2d") and self.turn % 2 == 1
        pool, units = self._start(Task.READ, chunks, _spans, descriptors, threads, hashed=paced)
        if paced:
            places = self._host.split(unit_nbytes(self.case.buffer_size))
            self._reads = _PacedReads(pool, units, places)

    def _start_writing(self, offer: Offer) -> None:
        """To new files with reserved space."""
        folder = self.write_folder
        self.resources.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True)
        paths = [folder / str(index) for index in range(len(offer.files))]
        descriptors = self._open(paths, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for descriptor, spec in zip(descriptors, offer.files, strict=True):
            _reserve(descriptor, spec.nbytes)
        self._written = descriptors
        threads = num_io_threads(offer.assignment.ranks_on_host)
        self._start(Task.WRITE, offer.chunks(), _spans, descriptors, threads)

    def _open(self, paths: Iterable[Path], flags: int) -> array[int]:
        descriptors = array("i")
        for path in paths:
            descriptors.append(os.open(path, flags | os.O_CLOEXEC, 0o600))
            self.resources.callback(os.close, descriptors[-1])
        return descriptors

    def _start(
        self,
        task: Task,
        chunks: Sequence[Chunk],
        spans_of: SpansOf,
        descriptors: array[int],
        num_threads: int,
        *,
        hashed: bool = False,
    ) -> tuple[Pool, Sequence[ScheduledUnit]]:
        """Start I/O threads, which wait for `run`; units take turns in the host's memory."""
        size = self.case.buffer_size
        unit = unit_nbytes(size) if self.ranks.on_gpu else size
        num_places = self._host.numel() // unit
        schedule = make_schedule(chunks, unit, lambda _, i: i % num_places * unit, spans_of)
        work = Work(
            "limit",
            task,
            schedule,
            self._host.data_ptr(),
            self._host,
            descriptors,
            make_digests(schedule),
            make_differences(schedule, task),
            hashed=hashed,
        )
        pool = start_pool(work, num_threads)
        self.resources.callback(self._close_pool, pool)
        self._pools.append((pool, len(schedule.units)))
        return pool, schedule.units

    def _close_pool(self, pool: Pool) -> None:
        """A thread that is stuck in a system call may still use the memory."""
        self._is_idle = pool.close(CLOSE_LIMIT_S) and self._is_idle


class _PacedReads:
    """Reads that keep step with their copies to the device: each waits for the other."""

    def __init__(
        self, pool: Pool, units: Sequence[ScheduledUnit], places: Sequence[torch.Tensor]
    ) -> None:
        self.pool = pool
        self._units = units
        self._places = places
        self._copies: deque[tuple[int, torch.cuda.Event]] = deque()  # of the units below
        self._num_read = self._num_copied = 0
        self._ahead_nbytes = 0  # read, but not asked for

    def copy(self, into: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Enqueue a copy on `stream`, the current one, once as many bytes more have been read."""
        while self._ahead_nbytes < into.numel() and self._num_read < len(self._units):
            self._await_read(self._num_read)
            self._ahead_nbytes += self._units[self._num_read].nbytes
            self._num_read += 1
        self._ahead_nbytes -= into.numel()
        place = self._places[(self._num_read - 1) % len(self._places)]
        into.copy_(place[: into.numel()], non_blocking=True)
        self._copies.append((self._num_read, stream.record_event()))

    def allow_rest(self) -> None:
        """Allow the units that no copy has asked for."""
        self.pool.allow(len(self._units))

    def _await_read(self, unit: int) -> None:
        num_places = len(self._places)
        while self._copies and (
            self._copies[0][1].query() or self._num_copied + num_places <= unit
        ):
            self._num_copied, event = self._copies.popleft()
            event.synchronize()
        # A copy of many small units may need more of them than there are places.
        self.pool.allow(min(len(self._units), max(self._num_copied + num_places, unit + 1)))
        with suppress(PoolStopped):  # told after the broadcasts
            while not self.pool.wait(unit, _LONG_S):
                pass


def _reserve(descriptor: int, nbytes: int) -> None:
    """Reserve space for the file, where its file system can."""
    try:
        if nbytes:
            syscalls.fallocate(descriptor, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _spans(extent: Extent) -> Iterable[Span]:
    return (Span(extent.file, extent.offset, 0, extent.nbytes),)


def _spans_in(memory: torch.Tensor) -> SpansOf:
    """One extent after the other into memory."""
    at = memory.data_ptr()

    def spans_of(extent: Extent) -> Iterable[Span]:
        nonlocal at
        at += extent.nbytes
        return (Span(IN_MEMORY, at - extent.nbytes, 0, extent.nbytes),)

    return spans_of
