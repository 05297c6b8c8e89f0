"""The host's memory, as the kernel counts it. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_nbytes() -> int | None:
    """Memory that programs can still get without swapping; None if unknown."""
    try:
        facts = _MEMINFO.read_text()
    except OSError:  # a sandbox without /proc
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", facts, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
