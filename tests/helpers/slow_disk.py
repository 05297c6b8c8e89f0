"""A disk that writes SLOW_DISK bytes a second, for I/O threads in Python; see forge.py."""

from __future__ import annotations

import os
import threading
import time

RATE = float(os.environ["SLOW_DISK"])
LOCK = threading.Lock()
really_write = os.pwrite


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    with LOCK:
        time.sleep(len(data) / RATE)
    return really_write(fd, data, offset)


vars(os)["pwrite"] = pwrite
