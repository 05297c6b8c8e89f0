"""What the tests of I/O threads share: work without a plan, a gate for reads, threads counted."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from packcast.io.pool import start_pool
from packcast.io.schedule import Schedule, Span, make_schedule
from packcast.io.work import Pool, PoolStopped, Task, Work, make_differences, make_digests
from packcast.packed.plan import BLOCK, Chunk, Extent
from tests.helpers.commands import eventually
from tests.io.sinks import digests_of

UNIT = 2 * BLOCK
NBYTES = 5 * BLOCK + 12_345

Opened = Callable[[Path, bytes], int]
LIMIT_S = 20.0


class Gate:
    """A place where reads wait; see tests/helpers/held_disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def open(self) -> None:
        (self.folder / "open").touch()

    def await_reached(self) -> None:
        eventually((self.folder / "reached").exists, "a read that waits")


def num_threads() -> int:
    """How many threads this process has, as the kernel says."""
    return len(os.listdir("/proc/self/task"))


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Asserts that whatever threads begin within have ended when it is left."""
    before = num_threads()
    others = set(threading.enumerate())  # of an earlier test, maybe about to end
    yield
    # A thread that has been joined is in /proc for a moment longer.
    eventually(lambda: num_threads() <= before, "the threads' end")
    begun = set(threading.enumerate()) - others
    assert not [thread.name for thread in begun if thread.name.startswith("packcast")]


def address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@dataclass
class Bench:
    """`nbytes` of memory in units of two blocks, and what is done with them.

    `spans` are of the whole memory: their `at` counts from its first byte.
    """

    nbytes: int
    spans: Sequence[Span] = ()
    fds: Sequence[int] = ()
    memory: bytearray = field(init=False)
    schedule: Schedule = field(init=False)
    digests: bytearray = field(init=False)
    differences: array[int] = field(init=False)

    def __post_init__(self) -> None:
        self.memory = bytearray(b"\xa5" * self.nbytes)
        chunk = Chunk(0, 0, (Extent(0, 0, self.nbytes),), self.nbytes, 0)
        self.schedule = make_schedule([chunk], UNIT, lambda _, unit: unit * UNIT, self._spans_of)
        self.digests = make_digests(self.schedule)

    def start(self, task: Task, *, threads: int = 3, tolerant: bool = False) -> Pool:
        """The pool at work; nothing is allowed yet."""
        self.differences = make_differences(self.schedule, task)
        fds = array("i", self.fds or [-1])
        work = Work(
            "test",
            task,
            self.schedule,
            address(self.memory),
            self.memory,
            fds,
            self.digests,
            self.differences,
            tolerant,
        )
        return start_pool(work, threads)

    def do(self, task: Task, *, threads: int = 3, tolerant: bool = False) -> PoolStopped | None:
        """All of it; why it was not done."""
        pool = self.start(task, threads=threads, tolerant=tolerant)
        try:
            pool.allow(len(self.schedule.units))
            for unit in range(len(self.schedule.units)):
                assert pool.wait(unit, LIMIT_S)
        except PoolStopped as stopped:
            return stopped
        finally:
            assert pool.close(LIMIT_S)
        assert pool.totals().nbytes == self.nbytes
        return None

    def found(self) -> dict[int, int]:
        """The differences, by span of this."""
        whole = [self.schedule.span(i) for i in range(self.schedule.num_spans)]
        return {
            next(
                k
                for k, span in enumerate(self.spans)
                if span.file == part.file and span.offset <= part.offset < span.offset + span.nbytes
            ): offset
            for part, offset in zip(whole, self.differences, strict=True)
            if offset >= 0
        }

    def _spans_of(self, extent: Extent) -> Iterator[Span]:
        begin, end = extent.offset, extent.offset + extent.nbytes
        for span in self.spans:
            low, high = max(span.at, begin), min(span.at + span.nbytes, end)
            if low < high:
                yield Span(span.file, span.offset + low - span.at, low - begin, high - low)


def random_bytes(seed: int = 1, nbytes: int = NBYTES) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def promised(bench: Bench, data: bytes) -> Bench:
    """Bytes in memory, with their digests."""
    bench.memory[:] = data
    bench.digests[:] = digests_of(data)
    return bench
