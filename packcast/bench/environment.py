"""Where a bench runs, for its header: versions, hosts, devices, file systems."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

import packcast
from packcast.bench.model import BenchSettings, Environment
from packcast.bench.pagecache import file_system_of
from packcast.bench.ranks import Ranks
from packcast.io.pool import pool_kind
from packcast.launch.devices import host_name


def environment_of(settings: BenchSettings, ranks: Ranks) -> Environment:
    """The same on all ranks, which all call this."""
    directories = [settings.checkpoint or settings.directory]
    if "write" in settings.sinks:
        directories.append(settings.write_directory)
    systems = {str(directory): file_system_of(directory) for directory in directories}
    versions, systems = ranks.share((_versions(on_gpu=ranks.on_gpu), systems))
    facts: dict[str, object] = {
        "rank": ranks.rank,
        "host": host_name(),
        "device": str(ranks.device),
        "cores": len(os.sched_getaffinity(0)),
        "pool": pool_kind(),
    }
    if ranks.on_gpu:
        facts["gpu"] = torch.cuda.get_device_name(ranks.device)
    return Environment(
        versions=versions,
        backend="nccl" if ranks.on_gpu else "gloo",
        world_size=ranks.world_size,
        ranks=tuple(ranks.gather(facts)),
        file_systems=systems,
    )


def _versions(*, on_gpu: bool) -> dict[str, str]:
    versions = {
        "packcast": packcast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernel": platform.release(),
    }
    if on_gpu:
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["cuda"] = str(torch.version.cuda)
        with suppress(OSError):
            # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar ...
            first_line = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
            if driver := re.search(r" (\d+\.[\d.]+) ", first_line):
                versions["driver"] = driver[1]
    return versions
