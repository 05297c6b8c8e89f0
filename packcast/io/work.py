"""The input of a pool of I/O threads, and its results: the same types for both pools.

The numbers are those of _pool.c.
"""

from __future__ import annotations

import enum
import os
from array import array
from dataclasses import dataclass
from typing import Protocol

from packcast.io.schedule import Schedule
from packcast.packed.plan import BLOCK, DIGEST_NBYTES, MAX_PIECE


class Task(enum.IntEnum):
    """What to do with each block of memory, besides hashing it."""

    READ = 0  # filled from its spans, and its digest recorded
    WRITE = 1  # compared with its digest, then written to its spans, if it has any
    COMPARE = 2  # compared with its digest, then with its spans


class FailureKind(enum.IntEnum):
    """Why a pool has ended before its work was done."""

    ERRNO = 1
    END_OF_FILE = 2
    DAMAGED = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """The first failure of a pool: in `span`, at byte `offset` of its file.

    For a block with another digest: in `piece`, at byte `offset` of that."""

    kind: FailureKind
    errno: int
    piece: int
    span: int
    offset: int

    @property
    def reason(self) -> str:
        """The system's error message."""
        return os.strerror(self.errno)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a pool has done so far; `busy_s` adds up over its threads, times are perf_counter's."""

    nbytes: int
    busy_s: float
    first_begin: float
    last_end: float


@dataclass(frozen=True, slots=True)
class Work:
    """A schedule and the memory that its pieces refer to, which is kept until the pool has ended.

    `address` is where the memory begins that `owner` keeps alive. `descriptors`, by file, are set
    before a unit that needs them is allowed. `digests` has a digest for every block: found by READ,
    promised to the other tasks. `differences`, by span, are the offsets of the first bytes that
    differ, or -1 (COMPARE). `tolerant`: a block that does not have its digest is no failure, zeros
    take its place. Where it is not `hashed`, digests are neither found nor compared: for measuring
    what the threads alone reach. `name` is for threads.
    """

    name: str
    task: Task
    schedule: Schedule
    address: int
    owner: object
    descriptors: array[int]
    digests: bytearray
    differences: array[int]
    tolerant: bool = False
    hashed: bool = True

    @property
    def grain_nbytes(self) -> int:
        """How much an I/O thread does at a time. Many threads read one unit, so that it is there
        soon; but few write to one file, since its inode serialises them."""
        return BLOCK if self.task is Task.READ else MAX_PIECE


def make_digests(schedule: Schedule) -> bytearray:
    """A table for the schedule's digests, all zero."""
    return bytearray(DIGEST_NBYTES * max(1, schedule.num_blocks))


def make_differences(schedule: Schedule, task: Task) -> array[int]:
    """A table for the first differences in the schedule's spans, all -1."""
    return array("q", [-1]) * (schedule.num_spans if task is Task.COMPARE else 1)


class PoolStopped(Exception):
    """A unit cannot be done: `failure` says why, None after a stop."""

    def __init__(self, failure: Failure | None) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Pool(Protocol):
    """I/O threads at work on a schedule. All methods may be called from any thread."""

    def allow(self, num_units: int) -> None:
        """The first `num_units` units may be worked on: their memory, digests and descriptors are
        ready. Never fewer than before."""

    def wait(self, unit: int, timeout_s: float) -> bool:
        """Block until the unit is done, at most `timeout_s`; whether it is. Raises PoolStopped if
        it cannot be done."""

    def stop(self) -> None:
        """Have the threads end after the block at hand; does not wait."""

    def close(self, limit_s: float) -> bool:
        """Stop, and wait for the threads' end, at most so long. False: one is stuck in a system
        call, and nothing that the work refers to may be given to others."""

    def totals(self) -> Totals:
        """What has been done so far."""
