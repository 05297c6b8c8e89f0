"""Whether a file's pages are in memory, and how to get them out: what `--cold` stands on."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from packcast.errors import UsageError
from packcast.units import format_size

_IN_MEMORY_ONLY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
_TRIES = 3
# Read-ahead and others' reads may bring a page back; the bench measures gigabytes.
_TOLERATED_FRACTION = 0.01

_size, _pointer, _int = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _pointer
_libc.mmap.argtypes = [_pointer, _size, _int, _int, _int, ctypes.c_int64]
_libc.munmap.argtypes = [_pointer, _size]
_libc.mincore.argtypes = [_pointer, _size, ctypes.c_char_p]


def file_system_of(path: Path) -> str:
    """The type of the file system that the path, or its nearest parent that is there, lies on."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    argv = ["stat", "--file-system", "--format=%T", "--", str(there)]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_can_be_cold(path: Path) -> None:
    """Raise UsageError where the files are nowhere but in memory."""
    kind = file_system_of(path)
    if kind in _IN_MEMORY_ONLY:
        raise UsageError(
            f"--cold: {path} is on {kind}, whose files are always in memory",
            hint="choose a directory on a disk with --dir",
        )


def evict(paths: Iterable[Path]) -> None:
    """Take the files out of the page cache; raises UsageError where they stay in it."""
    for path in paths:
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            for _ in range(_TRIES):
                os.fsync(file.fileno())  # pages not yet written cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                cached = cached_nbytes(file.fileno(), nbytes)
                if cached <= nbytes * _TOLERATED_FRACTION:
                    break
            else:
                raise UsageError(
                    f"--cold: {format_size(cached)} of {path} stay in the page cache",
                    hint="something else has it open or mapped, or it belongs to another user",
                )


def cached_nbytes(descriptor: int, nbytes: int) -> int:
    """How much of the file is in the page cache, by mincore; all of it where that is not told."""
    if not nbytes:
        return 0
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
        if _libc.mincore(address, nbytes, pages) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        _libc.munmap(address, nbytes)
    resident = sum(page & 1 for page in pages.raw)  # the other bits mean nothing yet
    return min(nbytes, resident * mmap.PAGESIZE)
