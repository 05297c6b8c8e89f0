"""The page cache, for `--cold`: whether a file's pages are in memory, and how to evict them."""

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

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def file_system_of(path: Path) -> str:
    """The type of the file system of the path, or of its nearest parent that exists."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    argv = ["stat", "--file-system", "--format=%T", "--", str(existing)]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_can_be_cold(path: Path) -> None:
    """Raise UsageError where the file system keeps its files in memory."""
    kind = file_system_of(path)
    if kind in _IN_MEMORY_ONLY:
        raise UsageError(
            f"--cold: {path} is on {kind}, whose files are always in memory",
            hint="choose a directory on a disk with --dir",
        )


def evict(paths: Iterable[Path]) -> None:
    """Remove the files from the page cache; raises UsageError where they stay."""
    for path in paths:
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            for _ in range(_TRIES):
                os.fsync(file.fileno())  # dirty pages cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                cached = cached_nbytes(file.fileno(), nbytes)
                if cached <= nbytes * _TOLERATED_FRACTION:
                    break
            else:
                raise UsageError(
                    f"--cold: {format_size(cached)} of {path} stay in the page cache",
                    hint="another program has it open or mapped, or another user owns it",
                )


def cached_nbytes(descriptor: int, nbytes: int) -> int:
    """How much of the file is in the page cache, by mincore(2)."""
    if not nbytes:
        return 0
    # A private mapping is writable, as ctypes wants it; nothing is written.
    with mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
        code = _libc.mincore(ctypes.addressof(first), nbytes, pages)
        del first  # or the mapping could not be closed
    if code != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    resident = sum(page & 1 for page in pages.raw)  # the other bits are reserved
    return min(nbytes, resident * mmap.PAGESIZE)
