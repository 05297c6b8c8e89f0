"""Whether a file's pages are in memory, and how to get them out: what `--cold` stands on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from packcast.errors import UsageError

_IN_MEMORY_ONLY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
_TRIES = 3
_NUM_PROBES = 100
# Read-ahead and others' reads may bring a page back; the bench measures gigabytes.
_TOLERATED = 2


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
            for _ in range(_TRIES):
                os.fsync(file.fileno())  # pages not yet written cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if num_cached(file.fileno()) <= _TOLERATED:
                    break
            else:
                raise UsageError(
                    f"--cold: {path} stays in the page cache",
                    hint="something else has it open or mapped, or it belongs to another user",
                )


def num_cached(descriptor: int) -> int:
    """Of a hundred places of the file, how many can be read without waiting for a disk."""
    nbytes = os.fstat(descriptor).st_size
    found, byte = 0, bytearray(1)
    for offset in range(0, nbytes, max(1, nbytes // _NUM_PROBES)):
        try:
            found += os.preadv(descriptor, [byte], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:  # a file system that cannot tell
            return 0
    return found
