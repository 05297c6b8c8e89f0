"""What is done to a run of blocks in host memory: read, check, write, compare; block by block.

One function for threads and for helper processes; knows descriptors and memory, and no torch.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import xxhash

from packcast.ends.syscalls import address_of, first_difference, start_writeback
from packcast.errors import PackcastError
from packcast.packed.plan import BLOCK, DIGEST_NBYTES

_scratch = threading.local()


class Task(enum.IntEnum):
    """What is done with each block, while it is in the cache, beside taking its digest."""

    READ = 0  # filled from files before
    CHECK = 1  # nothing more
    WRITE = 2  # written to files, once its digest is the right one
    COMPARE = 3  # compared with files, once its digest is the right one


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes of a file, and where it lies in the job's memory."""

    fd: int
    offset: int
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """One extent's worth of work, from its first block on.

    `spans` do not overlap and are in the order of `at`; bytes outside of them are left alone.
    `digests` are the promised ones, one after the other; READ has none and finds them.
    """

    task: Task
    nbytes: int
    spans: tuple[Span, ...]
    digests: bytes = b""


@dataclass(frozen=True, slots=True)
class Failure:
    """A system call that failed; `errno` 0: the file ended before byte `offset`."""

    span: int
    offset: int
    errno: int

    @property
    def error(self) -> OSError:
        """What the kernel said, to be put into words by whoever knows the file."""
        return OSError(self.errno, os.strerror(self.errno))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job; where it is not `good`, its last blocks may be untouched."""

    seconds: float = 0.0
    digests: bytes = b""  # of all blocks, found by READ
    damaged_block: int | None = None  # the first one whose digest is not the promised one
    failure: Failure | None = None
    differences: tuple[tuple[int, int], ...] = ()  # span, and the first byte in it that differs
    error: PackcastError | None = None  # what kept the job from being done at all

    @property
    def good(self) -> bool:
        """Everything was done; what was compared may differ all the same."""
        return self.error is None and self.failure is None and self.damaged_block is None


class _Failed(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def perform(job: Job, memory: memoryview) -> Outcome:
    """Do the job in this thread; `memory` is exactly its bytes. Raises nothing but bugs."""
    begin = time.perf_counter()
    outcome = _DO[job.task](job, memory)
    return replace(outcome, seconds=time.perf_counter() - begin)


def _read(job: Job, memory: memoryview) -> Outcome:
    found = []
    parts = _Parts(job.spans)
    try:
        for begin in range(0, job.nbytes, BLOCK):
            end = min(begin + BLOCK, job.nbytes)
            for span, offset, low, high in parts.within(begin, end):
                _read_exactly(job.spans[span].fd, offset, memory[low:high], span)
            found.append(xxhash.xxh3_128_digest(memory[begin:end]))
    except _Failed as failed:
        return Outcome(failure=failed.failure)
    return Outcome(digests=b"".join(found))


def _check(job: Job, memory: memoryview) -> Outcome:
    return _each_proven(job, memory, lambda _begin, _end: None)


def _write(job: Job, memory: memoryview) -> Outcome:
    parts = _Parts(job.spans)

    def write(begin: int, end: int) -> None:
        for span, offset, low, high in parts.within(begin, end):
            _write_exactly(job.spans[span].fd, offset, memory[low:high], span)

    outcome = _each_proven(job, memory, write)
    if outcome.good:
        # The disk works meanwhile, and fsync has less to wait for at the end.
        for span in job.spans:
            with suppress(OSError):
                start_writeback(span.fd, span.offset, span.nbytes)
    return outcome


def _compare(job: Job, memory: memoryview) -> Outcome:
    parts = _Parts(job.spans)
    first: dict[int, int] = {}

    def compare(begin: int, end: int) -> None:
        for span, offset, low, high in parts.within(begin, end):
            there = _scratch_block()[: high - low]
            _read_exactly(job.spans[span].fd, offset, there, span)
            at = first_difference(address_of(memory[low:high]), address_of(there), high - low)
            if at is not None:
                first.setdefault(span, low + at - job.spans[span].at)

    outcome = _each_proven(job, memory, compare)
    return replace(outcome, differences=tuple(first.items()))


_DO = {Task.READ: _read, Task.CHECK: _check, Task.WRITE: _write, Task.COMPARE: _compare}


def _each_proven(job: Job, memory: memoryview, then: Callable[[int, int], None]) -> Outcome:
    """Prove each block by its digest and pass it on, up to the first that is damaged or fails."""
    for block, begin in enumerate(range(0, job.nbytes, BLOCK)):
        end = min(begin + BLOCK, job.nbytes)
        promised = job.digests[block * DIGEST_NBYTES : (block + 1) * DIGEST_NBYTES]
        if xxhash.xxh3_128_digest(memory[begin:end]) != promised:
            return Outcome(damaged_block=block)
        try:
            then(begin, end)
        except _Failed as failed:
            return Outcome(failure=failed.failure)
    return Outcome()


class _Parts:
    """The parts of spans that lie within blocks, asked for in the order of the blocks."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._next = 0

    def within(self, begin: int, end: int) -> list[tuple[int, int, int, int]]:
        """(span, offset in its file, from, to) of each span's part in memory `begin` to `end`."""
        parts = []
        while self._next < len(self._spans):
            span = self._spans[self._next]
            low, high = max(begin, span.at), min(end, span.at + span.nbytes)
            if low < high:
                parts.append((self._next, span.offset + low - span.at, low, high))
            if span.at + span.nbytes > end:
                break
            self._next += 1
        return parts


def _scratch_block() -> memoryview:
    block: memoryview | None = getattr(_scratch, "block", None)
    if block is None:
        block = _scratch.block = memoryview(bytearray(BLOCK))
    return block


def _read_exactly(fd: int, offset: int, into: memoryview, span: int) -> None:
    while into:
        try:
            num_read = os.preadv(fd, [into], offset)
        except OSError as error:
            raise _Failed(Failure(span, offset, error.errno or 0)) from error
        if not num_read:
            raise _Failed(Failure(span, offset, 0))
        into, offset = into[num_read:], offset + num_read


def _write_exactly(fd: int, offset: int, data: memoryview, span: int) -> None:
    while data:
        try:
            num_written = os.pwrite(fd, data, offset)
        except OSError as error:
            raise _Failed(Failure(span, offset, error.errno or 0)) from error
        data, offset = data[num_written:], offset + num_written
