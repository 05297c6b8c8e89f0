"""The open files of a schedule: opened once, before the first unit that needs them.

Knows descriptors and indices of files only.
"""

from __future__ import annotations

import os
import resource
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from packcast.errors import TransferError
from packcast.io.schedule import ScheduledUnit

MAX_OPEN_FILES = 1024
_KEPT_FREE = 256  # for sockets, libraries and everything else in the process


class Resources:
    """What the I/O threads need for a unit besides staging: open files, or memory of tensors.

    This base class is for units that need neither. `descriptors` has the open files, by index, and
    is always the same array.
    """

    def __init__(self, num_files: int = 1) -> None:
        self.descriptors = array("i", [-1]) * max(1, num_files)

    def admit(self, unit: ScheduledUnit, *, is_next: bool) -> bool:
        """Acquire what the unit needs, before it is allowed. False: try again once an earlier unit
        is retired; never if it `is_next`, that is, if all earlier ones are retired."""
        return True

    def retire(self, unit: ScheduledUnit) -> None:
        """The unit is done, and all before it."""

    def hold(self) -> None:
        """From now on I/O threads may use it: nothing is closed under them."""

    def let_go(self) -> None:
        """The I/O threads have ended; not called where one is stuck."""


def open_files_limit(num_files: int) -> int:
    """How many of `num_files` to keep open at once; raises the soft limit where it may."""
    wanted = min(num_files, MAX_OPEN_FILES)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _KEPT_FREE:
        raised = wanted + _KEPT_FREE
        if hard != resource.RLIM_INFINITY:
            raised = min(raised, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return max(1, wanted)
    return max(1, min(wanted, soft - _KEPT_FREE if soft > 2 * _KEPT_FREE else soft // 2))


class FileTable(Resources):
    """Files by index, at most `limit` of them open, unless one unit needs more.

    A file that no later unit needs is closed by `close_file`; with `keeps_open` only when the limit
    is reached. `close` may be called from any thread; opening raises TransferError after it.
    """

    def __init__(
        self,
        num_files: int,
        open_file: Callable[[int], int],
        close_file: Callable[[int, int], None],
        *,
        keeps_open: bool = False,
    ) -> None:
        super().__init__(num_files)
        self._open_file = open_file
        self._close_file = close_file
        self._limit = open_files_limit(num_files)
        self._keeps_open = keeps_open
        self._idle: dict[int, None] = {}  # open, but not needed by any unit; the oldest first
        self._num_open = 0
        self._lock = threading.RLock()
        self._held = self._closed = False
        self._borrowed = 0
        self._all_closed = threading.Event()

    def admit(self, unit: ScheduledUnit, *, is_next: bool) -> bool:
        with self._lock:
            busy = self._num_open - len(self._idle)
            if not is_next and busy + len(unit.opens) > self._limit:
                return False
            for file in unit.opens:
                self.open(file)
        return True

    def retire(self, unit: ScheduledUnit) -> None:
        for file in unit.closes:
            self.release(file)

    def open(self, file: int) -> int:
        """The file's descriptor, until `release`."""
        with self._lock:
            if self._closed:
                raise TransferError("the transfer was aborted")
            self._idle.pop(file, None)
            if self.descriptors[file] < 0:
                while self._idle and self._num_open >= self._limit:
                    self._close(next(iter(self._idle)))
                self.adopt(file, self._open_file(file))
            return self.descriptors[file]

    def adopt(self, file: int, fd: int) -> None:
        """Take over a descriptor of the file."""
        with self._lock:
            self.descriptors[file] = fd
            self._num_open += 1

    def release(self, file: int) -> None:
        """No unit needs the file any more. Raises what `close_file` does."""
        with self._lock:
            if self._closed:
                return  # all are, or will be once no I/O thread can be using one
            self._idle[file] = None
            if not self._keeps_open or self._num_open > self._limit:
                self._close(file)

    @contextmanager
    def borrow(self, file: int) -> Iterator[int]:
        """The file's descriptor until the block is left; for any thread."""
        with self._lock:
            fd = self.open(file)
            self._borrowed += 1
        try:
            yield fd
        finally:
            with self._lock:
                self._borrowed -= 1
                if self._closed:
                    self._close_all()
                else:
                    self.release(file)

    def hold(self) -> None:
        self._held = True

    def let_go(self) -> None:
        with self._lock:
            self._held = False
            if self._closed:
                self._close_all()

    def close(self) -> None:
        """Close all, as soon as no I/O thread can be using one; without `close_file`."""
        with self._lock:
            self._closed = True
            self._close_all()

    def wait_closed(self, timeout_s: float) -> bool:
        """After `close`: wait until they are."""
        return self._all_closed.wait(timeout_s)

    def _close(self, file: int) -> None:
        self._idle.pop(file, None)
        fd, self.descriptors[file] = self.descriptors[file], -1
        self._num_open -= 1
        self._close_file(file, fd)

    def _close_all(self) -> None:
        if self._held or self._borrowed:
            return
        for file, fd in enumerate(self.descriptors):
            if fd >= 0:
                self.descriptors[file] = -1
                # Its errors are not lost: a later fsync of the file reports them.
                with suppress(OSError):
                    os.close(fd)
        self._num_open = 0
        self._idle.clear()
        self._all_closed.set()


def close_quietly(_file: int, fd: int) -> None:
    """A `close_file` for files whose errors do not matter."""
    with suppress(OSError):
        os.close(fd)
