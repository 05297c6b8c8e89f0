"""Where a bench runs: versions, hosts, devices, file systems; what its header says.

Asks the machine once; measures nothing.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import packcast
from packcast.bench.pagecache import file_system_of
from packcast.group.devices import host_name
from packcast.io.memory import available_nbytes
from packcast.io.pool import pool_kind


def versions(backend: str) -> dict[str, str]:
    """Of everything that the numbers depend on."""
    found = {
        "packcast": packcast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernel": platform.release(),
    }
    if backend == "nccl":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cuda"] = str(torch.version.cuda)
        driver = _driver()
        if driver:
            found["driver"] = driver
    return found


def facts_of_rank(rank: int, device: torch.device) -> dict[str, object]:
    """One rank's place, small enough for the control channel."""
    facts: dict[str, object] = {
        "rank": rank,
        "host": host_name(),
        "device": str(device),
        "cores": len(os.sched_getaffinity(0)),
        "pool": pool_kind(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def file_systems(directories: Iterable[Path]) -> dict[str, str]:
    """Directory -> tmpfs, ext4, ..."""
    return {str(directory): file_system_of(directory) for directory in directories}


def free_device_nbytes(device: torch.device) -> int:
    """What could be allocated there now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_nbytes()
    return sys.maxsize if available is None else available


def _driver() -> str | None:
    try:
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar ...
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)
