"""Where a bench runs: versions, hosts, devices, file systems; what its header says."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import packcast
from packcast.bench.model import BenchSettings, Environment
from packcast.bench.pagecache import file_system_of
from packcast.bench.ranks import Ranks
from packcast.io.pool import pool_kind
from packcast.launch.devices import host_name


def environment_of(settings: BenchSettings, ranks: Ranks) -> Environment:
    """All ranks call this, and all get the same."""
    directories = [settings.checkpoint or settings.directory]
    if "write" in settings.sinks:
        directories.append(settings.write_directory)
    systems = {str(directory): file_system_of(directory) for directory in directories}
    versions, systems = ranks.share((_versions(on_gpu=ranks.on_gpu), systems))
    return Environment(
        versions=versions,
        backend="nccl" if ranks.on_gpu else "gloo",
        world_size=ranks.world_size,
        ranks=tuple(ranks.gather(_facts(ranks.rank, ranks.device))),
        file_systems=systems,
    )


def _versions(*, on_gpu: bool) -> dict[str, str]:
    """Of everything that the numbers depend on."""
    found = {
        "packcast": packcast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernel": platform.release(),
    }
    if on_gpu:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cuda"] = str(torch.version.cuda)
        if driver := _driver():
            found["driver"] = driver
    return found


def _facts(rank: int, device: torch.device) -> dict[str, object]:
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


def _driver() -> str | None:
    try:
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar ...
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)
