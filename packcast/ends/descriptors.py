"""A bounded number of open files, opened when first used and shared between threads.

Knows descriptors and indices of files; not what is read from them or written to them.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

MAX_OPEN_FILES = 1024
_KEPT_FREE = 256  # for sockets, libraries and everything else in the process


class DescriptorsClosed(Exception):
    """A file was asked for after `close`."""


@dataclass(slots=True)
class _Open:
    fd: int
    num_users: int = 0


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


class Descriptors:
    """Files by index; the least recently used idle one is closed when there are too many.

    One that is in use is never closed under its user, so the bound may be passed by as many
    files as there are parts in work at a time.
    """

    def __init__(self, open_file: Callable[[int], int], limit: int) -> None:
        self._open_file = open_file
        self._limit = limit
        self._changed = threading.Condition(threading.RLock())
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._closed = False

    def adopt(self, index: int, fd: int) -> None:
        """Take over a descriptor that the caller has just made for file `index`."""
        with self._changed:
            if self._closed:
                os.close(fd)
                raise DescriptorsClosed
            self._open[index] = _Open(fd)
            self._close_idle(self._limit)

    def lend(self, index: int) -> int:
        """The descriptor of file `index`, kept open until `give_back`.

        Raises DescriptorsClosed after `close`, and what opening the file raises.
        """
        with self._changed:
            if self._closed:
                raise DescriptorsClosed
            found = self._open.get(index)
            if found is None:
                found = self._open[index] = _Open(self._open_file(index))
            self._open.move_to_end(index)
            found.num_users += 1
            self._close_idle(self._limit)
            return found.fd

    def give_back(self, index: int) -> None:
        """One user of file `index` has done with it."""
        with self._changed:
            self._open[index].num_users -= 1
            self._close_idle(0 if self._closed else self._limit)
            self._changed.notify_all()

    @contextmanager
    def borrow(self, index: int) -> Iterator[int]:
        """`lend` it until the block is left."""
        fd = self.lend(index)
        try:
            yield fd
        finally:
            self.give_back(index)

    def close(self) -> None:
        """Close what is idle now, and the rest as it comes back; nothing can be borrowed then."""
        with self._changed:
            self._closed = True
            self._close_idle(0)

    def wait_closed(self, timeout_s: float) -> bool:
        """After `close`: wait until the last user has given its file back."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def _close_idle(self, limit: int) -> None:
        if len(self._open) <= limit:
            return
        for index, entry in list(self._open.items()):
            if entry.num_users == 0:
                del self._open[index]
                # Its errors are not lost: a later fsync of the file reports them.
                with suppress(OSError):
                    os.close(entry.fd)
                if len(self._open) <= limit:
                    return
