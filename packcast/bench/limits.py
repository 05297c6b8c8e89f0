"""What the hardware does without packcast: one rank's part in each measurement.

Every function is called by all ranks at once and calls `start` when it is ready, which comes back
on all of them together; ranks that take no part only do that. Each returns bytes and seconds of
this rank.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from packcast.bench.pagecache import evict
from packcast.bench.team import Team
from packcast.checkpoint.checkpoint import SourceFile
from packcast.errors import PackcastError
from packcast.io import syscalls
from packcast.packed.plan import PAGE, align_up
from packcast.packed.ring import host_view
from packcast.units import MIB

T = TypeVar("T")
# Called once by every rank, when it is ready.
Start = Callable[[], None]

COPY_NBYTES = 16 * MIB
_PIECE_NBYTES = 4 * MIB
_COPIES_AT_ONCE = 32
_NUM_WRITTEN_FILES = 8


@dataclass(frozen=True, slots=True)
class Pace:
    """One rank's bytes in one measurement, and the seconds that they took it."""

    nbytes: int = 0
    seconds: float = 0.0


def pace_of_read(
    team: Team,
    start: Start,
    files: Sequence[SourceFile],
    *,
    share: tuple[int, int] | None,
    num_threads: int,
    budget_s: float,
    cold: bool,
) -> Pace:
    """Read files into memory, pinned beside a GPU; `share` (2, 4) is every fourth piece from 2.

    For about `budget_s`, from the beginning again if that is not enough. Cold files are read only
    once, and past the page cache where the file system can: what the disk gives.
    """
    if share is None:
        start()
        return Pace()
    if cold:
        evict(file.path for file in files)
    first, step = share
    pieces = [
        (index, offset, min(_PIECE_NBYTES, file.nbytes - offset))
        for index, file in enumerate(files)
        for offset in range(0, file.nbytes, _PIECE_NBYTES)
    ][first::step]
    descriptors = [_open_to_read(file.path, direct=cold) for file in files]
    buffers = [_host_memory(_PIECE_NBYTES, team.device) for _ in range(num_threads)]
    views = [host_view(buffer) for buffer in buffers]

    def read(thread: int, piece: tuple[int, int, int]) -> int:
        index, offset, nbytes = piece
        # Whole pages: the last one of a file ends before it.
        view = views[thread][: align_up(nbytes, PAGE)]
        got = os.preadv(descriptors[index], [view], offset)
        if got != nbytes:
            raise PackcastError(f"{files[index].name} is not as long as it was")
        return got

    try:
        start()
        return _in_threads(team, pieces, read, num_threads, budget_s, again=not cold)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def pace_of_write(
    team: Team, start: Start, folder: Path, nbytes: int, *, takes_part: bool, num_threads: int
) -> Pace:
    """Write `nbytes` of random data over several files whose space is reserved; fsync included."""
    if not takes_part:
        start()
        return Pace()
    folder.mkdir(parents=True)
    each = nbytes // _NUM_WRITTEN_FILES
    descriptors: list[int] = []
    data = memoryview(os.urandom(_PIECE_NBYTES))
    pieces = [
        (index, offset, min(_PIECE_NBYTES, each - offset))
        for offset in range(0, each, _PIECE_NBYTES)
        for index in range(_NUM_WRITTEN_FILES)
    ]

    def write(_: int, piece: tuple[int, int, int]) -> int:
        index, offset, size = piece
        left = data[:size]
        while left:
            written = os.pwrite(descriptors[index], left, offset)
            left, offset = left[written:], offset + written
        with suppress(OSError):  # the disk works meanwhile, as it does for packcast
            syscalls.start_writeback(descriptors[index], offset - size, size)
        return size

    def sync(_: int, descriptor: int) -> int:
        os.fsync(descriptor)
        return 0

    try:
        for index in range(_NUM_WRITTEN_FILES):
            descriptors.append(
                os.open(folder / f"limit-{index}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            )
            reserve(descriptors[-1], each)
        start()
        pace = _in_threads(team, pieces, write, num_threads, None, again=False)
        began = time.perf_counter()
        _in_threads(team, descriptors, sync, _NUM_WRITTEN_FILES, None, again=False)
        return Pace(pace.nbytes, pace.seconds + time.perf_counter() - began)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def pace_of_copies(
    team: Team, start: Start, *, takes_part: bool, to_device: bool, budget_s: float
) -> Pace:
    """Copies of 16 MiB between pinned memory and the device, one way, for about `budget_s`."""
    if not takes_part:
        start()
        return Pace()
    host = torch.empty(COPY_NBYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=team.device)
    origin, target = (host, there) if to_device else (there, host)
    origin.random_()
    target.copy_(origin)
    start()
    began, nbytes = time.perf_counter(), 0
    while time.perf_counter() - began < budget_s:
        for _ in range(_COPIES_AT_ONCE):
            target.copy_(origin, non_blocking=True)
        team.synchronize()
        nbytes += _COPIES_AT_ONCE * COPY_NBYTES
    seconds = time.perf_counter() - began
    if not torch.equal(target.cpu(), origin.cpu()):
        raise PackcastError(f"copies to or from {team.device} do not arrive")
    return Pace(nbytes, seconds)


def pace_of_broadcast(team: Team, start: Start, nbytes: int, *, count: int) -> Pace:
    """`count` broadcasts from the sender, `nbytes` each, and their last bytes compared."""
    memory = torch.empty(nbytes, dtype=torch.uint8, device=team.device)
    memory.fill_(random.randrange(1, 256) if team.is_sender else 0)
    start()
    team.broadcast(memory, team.sender)  # the first one of a size is slower
    team.start_together()
    began = time.perf_counter()
    for _ in range(count):
        team.broadcast(memory, team.sender)
    team.synchronize()
    seconds = time.perf_counter() - began
    ends = memory[:: nbytes - 1].tolist()
    if not ends[0] or ends[0] != ends[1]:
        raise PackcastError("a plain broadcast does not arrive whole")
    return Pace(count * nbytes, seconds)


def _in_threads(
    team: Team,
    work: Sequence[T],
    do: Callable[[int, T], int],
    num_threads: int,
    budget_s: float | None,
    *,
    again: bool,
) -> Pace:
    """Spread `work` over threads; the bytes that `do(thread, item)` returns, and the time."""
    began = time.perf_counter()
    items = _items(work, None if budget_s is None else began + budget_s, again=again)
    lock = threading.Lock()
    totals = [0] * num_threads
    failures: list[Exception] = []

    def run(thread: int) -> None:
        try:
            if team.device.type == "cuda":  # or its first call would make a context on GPU 0
                torch.cuda.set_device(team.device)
            while not failures:
                with lock:
                    item = next(items, None)
                if item is None:
                    return
                totals[thread] += do(thread, item)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Pace(sum(totals), time.perf_counter() - began)


def _items(work: Sequence[T], deadline: float | None, *, again: bool) -> Iterator[T]:
    while work:
        for item in work:
            if deadline is not None and time.perf_counter() > deadline:
                return
            yield item
        if not again:
            return


def _host_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Whole pages; pinned beside a GPU."""
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def _open_to_read(path: Path, *, direct: bool) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which file systems say that cannot
                raise
    return os.open(path, flags)


def reserve(descriptor: int, nbytes: int) -> None:
    """Have room for the file's first `nbytes`, where its file system can promise that."""
    try:
        syscalls.fallocate(descriptor, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
