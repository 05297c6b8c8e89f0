"""What this process holds, as the kernel says."""

from __future__ import annotations

import gc
import os


def num_descriptors() -> int:
    """How many this process has open, without those that only wait to be collected."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
