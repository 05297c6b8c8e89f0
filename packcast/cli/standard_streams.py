"""The standard streams as a command finds them: closed, full, hung up, ASCII, non-blocking.

What people are told is never worth a transfer: what standard error cannot take is dropped. A result
that standard output cannot take is an error, said once. Knows no command.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TextIO

from packcast.errors import DestinationError

_PATIENCE_S = 1.0  # for a terminal or pipe that takes nothing just now


def secure_streams() -> None:
    """Have nothing that is written there raise anything but our own errors.

    First of all in a process: a descriptor that is closed would be given to the next file that is
    opened, and what a library complains about would be written into that.
    """
    _open_closed(0, os.O_RDONLY)
    _open_closed(1, os.O_RDONLY)  # so that a result which is written there is missed
    _open_closed(2, os.O_WRONLY)
    sys.stdout = _text(_Result(1), sys.stdout)
    sys.stderr = _text(_Talk(2), sys.stderr)


def flush_streams() -> None:
    """Write what is kept back; raises DestinationError where a result cannot be written."""
    sys.stdout.flush()
    sys.stderr.flush()


def _open_closed(fd: int, flags: int) -> None:
    try:
        os.fstat(fd)
    except OSError:
        opened = os.open(os.devnull, flags)
        if opened != fd:
            os.dup2(opened, fd)
            os.close(opened)
        os.set_inheritable(fd, True)


def _text(raw: _Stream, before: TextIO | None) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None) or "utf-8"
    # Characters that the encoding lacks are written as escapes.
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=raw.is_unbuffered or raw.isatty(),
        write_through=raw.is_unbuffered,
    )


class _Stream(io.RawIOBase):
    """A descriptor that belongs to the process, not to this object."""

    is_unbuffered = False

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._has_failed = False

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """All of it, or none that anybody hears of again after a failure."""
        assert isinstance(data, bytes | bytearray | memoryview)
        view = memoryview(data).cast("B")
        if not self._has_failed:
            try:
                self._write_all(view)
            except OSError as error:
                self._has_failed = self._fail(error)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # somebody who shares the terminal has set O_NONBLOCK
                if not self._wait():
                    return

    def _wait(self) -> bool:
        """Until something can be written; False where that is not worth waiting for."""
        raise NotImplementedError

    def _fail(self, error: OSError) -> bool:
        """Whether nothing more is to be tried."""
        raise NotImplementedError


class _Talk(_Stream):
    """Standard error, for people."""

    is_unbuffered = True

    def _wait(self) -> bool:
        return bool(select.select([], [self._fd], [], _PATIENCE_S)[1])

    def _fail(self, error: OSError) -> bool:
        return False  # a disk that is full now may have room later


class _Result(_Stream):
    """Standard output, for what was asked for."""

    def _wait(self) -> bool:
        select.select([], [self._fd], [])
        return True

    def _fail(self, error: OSError) -> bool:
        if error.errno != errno.EPIPE:  # who reads has what was wanted, as `head` has
            self._has_failed = True
            reason = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise DestinationError(f"cannot write to standard output: {reason}") from None
        return True
