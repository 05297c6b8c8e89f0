"""The loop of an I/O thread in Python, for hosts without the compiled one: same schedule, slower.

Follows _pool.c step by step; change both together.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections import Counter
from contextlib import suppress

import xxhash

from packcast.io.schedule import IN_MEMORY, Span
from packcast.io.syscalls import address_of, first_difference, start_writeback
from packcast.io.work import Failure, FailureKind, PoolStopped, Task, Totals, Work
from packcast.packed.plan import BLOCK, DIGEST_NBYTES


class _Stopped(Exception):
    """A system call failed with `code`, or 0 where the file ends, at this offset of its file."""

    def __init__(self, code: int, offset: int) -> None:
        super().__init__(code, offset)
        self.code = code
        self.offset = offset


class _FailedPiece(Exception):
    def __init__(self, failure: Failure | None) -> None:
        self.failure = failure


class ThreadPool:
    """I/O threads of this interpreter; see `packcast.io.work.Pool`. Started when it is made."""

    def __init__(self, work: Work, num_threads: int) -> None:
        schedule = work.schedule
        self._work = work
        pieces = [schedule.piece(i) for i in range(schedule.num_pieces)]
        nbytes = max((memory + nbytes for _, memory, nbytes, _, _ in pieces), default=0)
        step = work.grain_nbytes
        grains = [
            (index, unit, begin, min(begin + step, piece_nbytes))
            for index, (unit, _, piece_nbytes, _, _) in enumerate(pieces)
            for begin in range(0, piece_nbytes, step)
        ]
        self._left = Counter(unit for _, unit, _, _ in grains)
        self._grains = iter(grains)
        array_type = ctypes.c_ubyte * nbytes
        self._memory = memoryview(array_type.from_address(work.address)).cast("B")
        self._changed = threading.Condition()
        self._allowed = 0
        self._stopped = False
        self._failure: Failure | None = None
        self._error: BaseException | None = None
        self._totals = Totals(0, 0.0, float("inf"), 0.0)
        self._threads = [
            threading.Thread(target=self._run, name=f"packcast-{work.name}", daemon=True)
            for _ in range(num_threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.stop()
            raise

    def allow(self, num_units: int) -> None:
        with self._changed:
            self._allowed = num_units
            self._changed.notify_all()

    def wait(self, unit: int, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: not self._left[unit] or self._stopped, timeout_s)
            if not self._left[unit]:
                return True
            if self._error is not None:
                raise self._error
            if self._stopped:
                raise PoolStopped(self._failure)
            return False

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self, limit_s: float) -> bool:
        self.stop()
        deadline = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def totals(self) -> Totals:
        return self._totals

    def _run(self) -> None:
        try:
            while self._do_next():
                pass
        except _FailedPiece as failed:
            with self._changed:
                self._failure = self._failure or failed.failure
            self.stop()
        except BaseException as error:  # a bug: wakes the waiting thread
            self._error = error
            self.stop()

    def _do_next(self) -> bool:
        """Do the next free grain, once it is allowed; False at the end."""
        with self._changed:
            grain = next(self._grains, None)
            if grain is None:
                return False
            index, unit, first, last = grain
            self._changed.wait_for(lambda: self._allowed > unit or self._stopped)
            if self._stopped:
                return False
        begin = time.perf_counter()
        self._do_grain(index, first, last)
        end = time.perf_counter()
        with self._changed:
            known = self._totals
            self._totals = Totals(
                known.nbytes + last - first,
                known.busy_s + end - begin,
                min(known.first_begin, begin),
                max(known.last_end, end),
            )
            self._left[unit] -= 1
            if not self._left[unit]:
                self._changed.notify_all()
        return True

    def _do_grain(self, index: int, first: int, last: int) -> None:
        """Block by block, so that each is hashed while it is in the cache."""
        work = self._work
        _, memory, _, block, span_range = work.schedule.piece(index)
        spans = [(i, work.schedule.span(i)) for i in span_range]
        for begin in range(first, last, BLOCK):
            if self._stopped:
                raise _FailedPiece(None)
            end = min(begin + BLOCK, last)
            data = self._memory[memory + begin : memory + end]
            if work.task is Task.READ:
                self._do_parts(index, spans, begin, data)
            if not work.hashed:
                if work.task is not Task.READ:
                    self._do_parts(index, spans, begin, data)
                continue
            at = (block + begin // BLOCK) * DIGEST_NBYTES
            found = xxhash.xxh3_128_digest(data)
            if work.task is Task.READ:
                work.digests[at : at + DIGEST_NBYTES] = found
                continue
            if found != work.digests[at : at + DIGEST_NBYTES]:
                if not work.tolerant:
                    raise _FailedPiece(Failure(FailureKind.DAMAGED, 0, index, -1, begin))
                work.digests[at : at + DIGEST_NBYTES] = bytes(DIGEST_NBYTES)  # not verified
            self._do_parts(index, spans, begin, data)
        if work.task is Task.WRITE:
            for _, span in spans:
                low, high = max(span.at, first), min(span.at + span.nbytes, last)
                if span.file != IN_MEMORY and low < high:
                    with suppress(OSError):
                        fd = work.descriptors[span.file]
                        start_writeback(fd, span.offset + low - span.at, high - low)

    def _do_parts(
        self, piece: int, spans: list[tuple[int, Span]], begin: int, data: memoryview
    ) -> None:
        """The parts of the spans that lie in the piece's bytes from `begin` on, which `data` is."""
        for index, span in spans:
            low, high = max(span.at, begin), min(span.at + span.nbytes, begin + len(data))
            if low < high:
                offset = span.offset + low - span.at
                part = data[low - begin : high - begin]
                try:
                    self._do_part(index, span.file, offset, part)
                except _Stopped as stopped:
                    kind = FailureKind.ERRNO if stopped.code else FailureKind.END_OF_FILE
                    raise _FailedPiece(
                        Failure(kind, stopped.code, piece, index, stopped.offset)
                    ) from stopped

    def _do_part(self, index: int, file: int, offset: int, data: memoryview) -> None:
        work = self._work
        if file == IN_MEMORY:
            here, there = address_of(data), offset
            if work.task is Task.READ:
                here, there = there, here
            ctypes.memmove(there, here, len(data))
        elif work.task is Task.READ:
            _read_exactly(work.descriptors[file], offset, data)
        elif work.task is Task.WRITE:
            _write_exactly(work.descriptors[file], offset, data)
        else:
            local = memoryview(bytearray(len(data)))
            _read_exactly(work.descriptors[file], offset, local)
            at = first_difference(address_of(data), address_of(local), len(data))
            if at is not None and work.differences[index] < 0:
                work.differences[index] = offset + at


def _read_exactly(fd: int, offset: int, into: memoryview) -> None:
    while into:
        try:
            num_read = os.preadv(fd, [into], offset)
        except OSError as error:
            raise _Stopped(error.errno or 0, offset) from error
        if not num_read:
            raise _Stopped(0, offset)
        into, offset = into[num_read:], offset + num_read


def _write_exactly(fd: int, offset: int, data: memoryview) -> None:
    while data:
        try:
            num_written = os.pwrite(fd, data, offset)
        except OSError as error:
            raise _Stopped(error.errno or 0, offset) from error
        if not num_written:
            raise _Stopped(errno.EIO, offset)
        data, offset = data[num_written:], offset + num_written
