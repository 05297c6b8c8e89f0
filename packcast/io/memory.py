"""The host's memory, as the kernel counts it. Knows no torch and nobody who wants some of it."""

from __future__ import annotations

import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_nbytes() -> int | None:
    """What programs could still be given without swapping; None where the kernel does not say."""
    try:
        facts = _MEMINFO.read_text()
    except OSError:  # a sandbox without /proc
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", facts, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
