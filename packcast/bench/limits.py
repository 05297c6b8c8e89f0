"""What the hardware does without packcast: one stage alone, or all stages of a row at once.

Stages do not wait for each other here, and nothing is planned, hashed or proven: I/O threads read
files into memory and write memory to files, copies and raw broadcasts run beside them, each as many
bytes as the row moves, on the same ranks, with the row's threads and grains. So no pipeline of
these stages can be faster. Measured in turn with the rows; the best run counts.
"""

from __future__ import annotations

import errno
import os
import shutil
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from packcast.bench.chainmethods import carry_all
from packcast.bench.dataset import offer_of_case
from packcast.bench.methods import Job, MethodRun, RunFailed, check_room, fill_with_poison
from packcast.bench.model import SENDER
from packcast.bench.pagecache import evict
from packcast.io import syscalls
from packcast.io.pinned import PinnedMemory
from packcast.io.pool import CLOSE_LIMIT_S, start_pool
from packcast.io.schedule import IN_MEMORY, Span, SpansOf, make_schedule
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


@dataclass(slots=True)
class _Active:
    """What runs on this rank, once it is prepared."""

    memory: torch.Tensor  # where broadcasts take place: as many slots as the row has buffers
    host: torch.Tensor  # where files are read to and written from: the same, or pinned
    target: torch.Tensor | None = None  # where bytes land on the device
    pools: list[tuple[Pool, int]] = field(default_factory=list)  # with their units
    written: Sequence[int] = ()


class LimitMethod(MethodRun):
    """The stages that `case.limit` names; `write_folder` is made, and removed again."""

    def __init__(self, job: Job, write_folder: Path) -> None:
        super().__init__(job)
        self._folder = write_folder
        self._ending = ExitStack()
        self._is_idle = True
        self._active: _Active | None = None
        self._chain: Chain | None = None

    def prepare(self) -> None:
        case, ranks = self.job.case, self.job.ranks
        nbytes = case.num_buffers * case.buffer_size
        check_room(self.job, nbytes)
        memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=ranks.device)
        memory = memory[-memory.data_ptr() % PAGE :][:nbytes]  # on pages, as packcast's
        self._active = active = _Active(memory, memory)
        if case.source == "resident":
            return
        offer = offer_of_case(self.job.data, case, ranks)
        if ranks.on_gpu:
            num_units = staging_count(case.buffer_size, staging_bound(offer))
            staging = PinnedMemory(num_units * unit_nbytes(case.buffer_size))
            self._ending.callback(lambda: staging.close(is_idle=self._is_idle))
            active.host = staging.tensor
        sink = "discard" if ranks.is_sender else case.sink
        if self._has("land") and sink == "land":
            active.target = torch.empty(offer.nbytes, dtype=torch.uint8, device=ranks.device)
        # What is compared is read: looking at it takes next to nothing.
        compares = self._has("verify") and sink == "verify"
        mine = self._has("read") and ranks.rank in self.job.readers
        if compares or mine:
            self._start_reading(offer, everything=compares)
        if self._has("write") and sink == "write":
            self._start_writing(offer)
        elif active.target is not None and not ranks.on_gpu:
            threads = num_io_threads(offer.assignment.ranks_on_host)
            self._start(Task.WRITE, offer.chunks(), _spans_in(active.target), array("i"), threads)

    def connect(self) -> None:
        """Over gloo every other run is a bare chain of ranks: what is faster is the limit."""
        job = self.job
        if not job.ranks.on_gpu and self._has("broadcast") and job.turn % 2 == 0:
            roots = job.readers if job.case.source == "file" else (SENDER,)
            self._chain = job.ranks.open_chain(roots, job.run_id)

    def poison(self) -> None:
        """And have every page of the memory there, as packcast's is."""
        active = self._prepared()
        fill_with_poison(active.memory, active.host)
        if active.target is not None:
            fill_with_poison(active.target)

    def run(self) -> None:
        active = self._prepared()
        for pool, num_units in active.pools:
            pool.allow(num_units)
        if self.job.ranks.on_gpu:
            self._copy_and_broadcast(active)
        elif self._chain is not None:
            carry_all(self._chain, list(self._calls(active.memory)), self.job.case.num_buffers)
        elif self._has("broadcast"):
            for slot, root in self._calls(active.memory):
                self.job.ranks.broadcast(slot, root)
        # After the broadcasts: whatever fails now leaves no other rank waiting.
        try:
            for pool, num_units in active.pools:
                for unit in range(num_units):
                    while not pool.wait(unit, _LONG_S):
                        pass
            with ThreadPoolExecutor(_NUM_SYNC_THREADS) as threads:
                list(threads.map(os.fsync, active.written))
        except PoolStopped as stopped:
            failure = stopped.failure
            ended = failure is not None and failure.kind is FailureKind.END_OF_FILE
            reason = "a file has ended early" if ended else failure.reason if failure else "stopped"
            raise RunFailed(f"an I/O thread failed: {reason}") from stopped
        except OSError as error:
            raise RunFailed(f"cannot write {self._folder}: {error.strerror}") from error

    def check(self) -> int:
        """What comes here is nobody's."""
        return 0

    def close(self) -> None:
        if self._chain is not None:
            self._chain.close()
            self._chain = None
        self._ending.close()
        self._active = None

    def _has(self, stage: str) -> bool:
        return self.job.case.limit in ("together", stage)

    def _prepared(self) -> _Active:
        assert self._active is not None, "prepare comes first"
        return self._active

    def _calls(self, memory: torch.Tensor) -> Iterable[tuple[torch.Tensor, int]]:
        """The broadcasts, each with its slot and root; readers take turns."""
        case, nbytes = self.job.case, self.job.nbytes
        roots = self.job.readers if case.source == "file" else (SENDER,)
        slots = memory.split(case.buffer_size)
        for i, begin in enumerate(range(0, nbytes, case.buffer_size)):
            size = min(case.buffer_size, nbytes - begin)
            yield slots[i % len(slots)][:size], roots[i % len(roots)]

    def _copy_and_broadcast(self, active: _Active) -> None:
        """On a GPU: on a stream each, so many chunks ahead as there are buffers."""
        ranks, sink = self.job.ranks, self.job.case.sink
        stages = [stage for stage in ("h2d", "broadcast") if self._has(stage)]
        if not ranks.is_sender and self._has("d2h") and sink in ("write", "verify"):
            stages.append("d2h")
        if active.target is not None:
            stages.append("land")
        streams = {
            stage: torch.cuda.Stream(ranks.device, priority=-(stage == "broadcast"))
            for stage in stages
        }
        under_way: deque[torch.cuda.Event] = deque()
        landed = 0
        for slot, root in self._calls(active.memory):
            for stage, stream in streams.items():
                with torch.cuda.stream(stream):
                    if stage == "broadcast":
                        ranks.broadcast(slot, root)
                    elif stage == "land":
                        assert active.target is not None, "or nothing lands"
                        there = active.target[landed : landed + slot.numel()]
                        there.copy_(slot[: there.numel()], non_blocking=True)
                        landed += slot.numel()
                    elif stage == "d2h" or root == ranks.rank:
                        for part in slot.split(unit_nbytes(self.job.case.buffer_size)):
                            host = active.host[: part.numel()]
                            if stage == "h2d":
                                part.copy_(host, non_blocking=True)
                            else:
                                host.copy_(part, non_blocking=True)
                    under_way.append(stream.record_event())
            while len(under_way) > self.job.case.num_buffers * len(streams):
                under_way.popleft().synchronize()
        ranks.synchronize()

    def _start_reading(self, offer: Offer, *, everything: bool) -> None:
        paths = {file.name: file.path for file in self.job.data.opened().files}
        wanted = [paths[spec.name] for spec in offer.files]
        if self.job.cold:
            evict(wanted)
        chunks = [c for c in offer.chunks() if everything or c.root == self.job.ranks.rank]
        descriptors = _opened(wanted, os.O_RDONLY, self._ending)
        sharing = offer.assignment.ranks_on_host if everything else offer.assignment.readers_on_host
        self._start(Task.READ, chunks, _spans, descriptors, num_io_threads(sharing))

    def _start_writing(self, offer: Offer) -> None:
        """New files with room for what will be written."""
        self._ending.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        names = [self._folder / str(index) for index in range(len(offer.files))]
        descriptors = _opened(names, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._ending)
        for descriptor, spec in zip(descriptors, offer.files, strict=True):
            _reserve(descriptor, spec.nbytes)
        self._prepared().written = descriptors
        threads = num_io_threads(offer.assignment.ranks_on_host)
        self._start(Task.WRITE, offer.chunks(), _spans, descriptors, threads)

    def _start(
        self,
        task: Task,
        chunks: Sequence[Chunk],
        spans_of: SpansOf,
        descriptors: array[int],
        num_threads: int,
    ) -> None:
        """I/O threads that wait to be allowed; units take turns in the host's memory."""
        active, size = self._prepared(), self.job.case.buffer_size
        unit = unit_nbytes(size) if self.job.ranks.on_gpu else size
        places = active.host.numel() // unit
        schedule = make_schedule(chunks, unit, lambda _, i: i % places * unit, spans_of)
        work = Work(
            "limit",
            task,
            schedule,
            active.host.data_ptr(),
            active.host,
            descriptors,
            make_digests(schedule),
            make_differences(schedule, task),
            hashed=False,
        )
        pool = start_pool(work, num_threads)
        self._ending.callback(self._close_pool, pool)
        active.pools.append((pool, len(schedule.units)))

    def _close_pool(self, pool: Pool) -> None:
        """A thread that is stuck in a system call may still use the memory."""
        self._is_idle = pool.close(CLOSE_LIMIT_S) and self._is_idle


def _reserve(descriptor: int, nbytes: int) -> None:
    """Have room for the file's bytes, where its file system can promise that."""
    try:
        if nbytes:
            syscalls.fallocate(descriptor, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _spans(extent: Extent) -> Iterable[Span]:
    return (Span(extent.file, extent.offset, 0, extent.nbytes),)


def _spans_in(memory: torch.Tensor) -> SpansOf:
    """One extent after the other into memory, as they come."""
    at = memory.data_ptr()

    def spans_of(extent: Extent) -> Iterable[Span]:
        nonlocal at
        at += extent.nbytes
        return (Span(IN_MEMORY, at - extent.nbytes, 0, extent.nbytes),)

    return spans_of


def _opened(paths: Iterable[Path], flags: int, ending: ExitStack) -> array[int]:
    descriptors = array("i")
    for path in paths:
        descriptors.append(os.open(path, flags | os.O_CLOEXEC, 0o600))
        ending.callback(os.close, descriptors[-1])
    return descriptors
