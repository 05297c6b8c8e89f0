"""Whether a file's pages are in memory, and how to get them out: what `--cold` stands on.

Knows paths and the kernel; nothing of checkpoints or ranks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from packcast.errors import UsageError
from packcast.units import format_size

_IN_MEMORY_ONLY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
_TRIES = 3
# Read-ahead and others' reads may bring a page back; the bench measures gigabytes.
_TOLERATED_FRACTION = 0.01

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_MOUNTS = Path("/proc/self/mountinfo")
_MAP_FAILED = ctypes.c_void_p(-1).value


def file_system_of(path: Path) -> str:
    """The type of the file system that the path, or its nearest parent that is there, lies on."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    real = str(there.resolve())
    best, kind = -1, "unknown"
    try:
        mounts = _MOUNTS.read_text().splitlines()
    except OSError:  # a sandbox without /proc
        return kind
    for line in mounts:
        # id parent major:minor root mount-point options [optional fields] - type source options
        mounted, _, rest = line.partition(" - ")
        point = _unescaped(mounted.split()[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # the newest of several at one place hides the others
            best, kind = len(point), rest.split()[0]
    return kind


def is_in_memory_only(path: Path) -> bool:
    """Is there no disk below its page cache?"""
    return file_system_of(path) in _IN_MEMORY_ONLY


def check_can_be_cold(path: Path) -> None:
    """Raise UsageError where the files are nowhere but in memory."""
    if is_in_memory_only(path):
        raise UsageError(
            f"--cold: {path} is on {file_system_of(path)}, whose files are always in memory",
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
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
        if _libc.mincore(address, nbytes, pages) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        _libc.munmap(address, nbytes)
    resident = sum(page & 1 for page in pages.raw)  # the other bits mean nothing yet
    return min(nbytes, resident * mmap.PAGESIZE)


def _unescaped(point: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(code, character)
    return point
