"""A disk that stops part way: Python imports this at its start where this folder is on its path.

In a process with HELD_DISK set, reads wait as soon as HELD_AFTER bytes have come, or without that
renames wait, until a file `open` appears in the folder HELD_DISK; `reached` appears there when the
first of them waits. HELD_POOL is a native pool whose reads are held too.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path


def wait_at(gate: Path) -> None:
    """Wait for the gate to open."""
    if not (gate / "open").exists():
        (gate / "reached").touch()
        while not (gate / "open").exists():
            time.sleep(0.01)


def hold_reads(gate: Path, after: int, pool: str | None) -> None:
    """Put a slow `os.preadv` in the place of the real one, and the slow pool in that of its own."""
    read = os.preadv
    count = _counted_here(gate, after) if pool is None else _held_pool(gate, after, pool)

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        got = read(fd, buffers, offset, flags)
        count(got)
        return got

    vars(os)["preadv"] = preadv


def _counted_here(gate: Path, after: int) -> Callable[[int], None]:
    lock, num_read = threading.Lock(), 0

    def count(nbytes: int) -> None:
        nonlocal num_read
        with lock:
            num_read += nbytes
            held = num_read > after
        if held:
            wait_at(gate)

    return count


def _held_pool(gate: Path, after: int, pool: str) -> Callable[[int], None]:
    from packcast.io import native

    library = native.open_library(Path(pool))
    hold, count = library.functions.packcast_test_hold, library.functions.packcast_test_count
    hold.argtypes, hold.restype = [ctypes.c_char_p, ctypes.c_int64], None
    count.argtypes, count.restype = [ctypes.c_int64], None
    hold(os.fsencode(gate), after)
    vars(native)["installed"] = lambda: library
    counted: Callable[[int], None] = count
    return counted


def hold_renames(gate: Path) -> None:
    """Put a slow `os.rename` in the place of the real one."""
    really_rename = os.rename

    def rename(
        src: str, dst: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        wait_at(gate)
        really_rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    vars(os)["rename"] = rename


if "HELD_DISK" in os.environ:
    if "HELD_AFTER" in os.environ:
        hold_reads(
            Path(os.environ["HELD_DISK"]),
            int(os.environ["HELD_AFTER"]),
            os.environ.get("HELD_POOL"),
        )
    else:
        hold_renames(Path(os.environ["HELD_DISK"]))
