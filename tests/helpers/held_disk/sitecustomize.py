"""A disk that stops part way: Python imports this at its start where this folder is on its path.

In a process with HELD_DISK set, reads wait as soon as HELD_AFTER bytes have come, or without that
renames wait, until a file `open` appears in the folder HELD_DISK; `reached` appears there when the
first of them waits.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path


def wait_at(gate: Path) -> None:
    """Wait for the gate to open."""
    if not (gate / "open").exists():
        (gate / "reached").touch()
        while not (gate / "open").exists():
            time.sleep(0.01)


def hold_reads(gate: Path, after: int) -> None:
    """Put a slow `os.preadv` in the place of the real one."""
    read, lock, num_read = os.preadv, threading.Lock(), 0

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        nonlocal num_read
        got = read(fd, buffers, offset, flags)
        with lock:
            num_read += got
            held = num_read > after
        if held:
            wait_at(gate)
        return got

    vars(os)["preadv"] = preadv


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
        hold_reads(Path(os.environ["HELD_DISK"]), int(os.environ["HELD_AFTER"]))
    else:
        hold_renames(Path(os.environ["HELD_DISK"]))
