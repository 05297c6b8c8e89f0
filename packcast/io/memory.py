"""The host's memory, as the kernel counts it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from packcast.units import format_size

MAX_LIMITS = 8

_PROC = Path("/proc")
_UNLIMITED = 1 << 60  # what cgroups v1 write for no limit is the largest page's address
# Files of a control group: its limits, what it uses, and which of that the kernel gives up for
# the asking. By the second field of its mount's type: v2, v1.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """How many bytes a limit on memory leaves free, and what people call it.

    Processes of one host that name the same `key` share it.
    """

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid"}  # in a RankInfo

    key: str
    free: int
    name: str


def available_nbytes(proc: Path | None = None) -> int | None:
    """What this process could still be given without swapping; None where the kernel is silent."""
    return min((limit.free for limit in memory_limits(proc)), default=None)


def memory_limits(proc: Path | None = None) -> tuple[MemoryLimit, ...]:
    """This host's memory, and each limit of a control group that this process is in: its own,
    and those above it. The tightest come first. `proc` is where the kernel tells of itself."""
    proc = proc or _PROC
    found: list[MemoryLimit] = []
    with suppress(OSError):  # a sandbox without /proc
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.M)
        if match:
            found.append(
                MemoryLimit(key="host", free=int(match[1]) * 1024, name="this host's memory")
            )
    with suppress(OSError, ValueError):
        for kind, mount, folder in _control_groups(proc):
            for at in (folder, *folder.parents):
                limit = _limit_of(at, kind)
                if limit is not None:
                    found.append(limit)
                if at == mount:
                    break
    return tuple(sorted(found, key=lambda limit: limit.free)[:MAX_LIMITS])


def _control_groups(proc: Path) -> Iterator[tuple[str, Path, Path]]:
    """Of the hierarchies that count memory: the kind, the mount, this process's folder in it."""
    paths: dict[str, str] = {}
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        mounted, _, kinds = line.partition(" - ")
        kind, _, options = kinds.split(" ")[:3]
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, mount = map(_unescaped, mounted.split(" ")[3:5])
        # Where a container sees its own group only, that is what is mounted, and the path may be
        # the host's, which leads nowhere here.
        below = paths[kind].removeprefix(root if root != "/" else "")
        inside = below == "" or below.startswith("/")
        folder = Path(mount + below) if inside and ".." not in below.split("/") else Path(mount)
        yield kind, Path(mount), folder if folder.is_dir() else Path(mount)


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _limit_of(folder: Path, kind: str) -> MemoryLimit | None:
    """The limit of one control group, where it has one.

    Pages of the file cache count as used, but go when others are wanted: a checkpoint that was
    just read would fill a container else. Files on a tmpfs are not among them.
    """
    limits, usage, reclaimable = _FILES[kind]
    try:
        nbytes, file = min((_number(folder / name), folder / name) for name in limits)
        if nbytes >= _UNLIMITED:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = _number(folder / usage) - sum(int(stat.get(name, 0)) for name in reclaimable)
        there = folder.stat()
    except (OSError, ValueError):  # no such controller here
        return None
    where = str(file) if str(file).isprintable() and len(str(file)) < 400 else file.name
    return MemoryLimit(
        key=f"{there.st_dev}:{there.st_ino}",
        free=max(0, nbytes - max(0, used)),
        name=f"the limit of {format_size(nbytes)} in {where}",
    )


def _number(file: Path) -> int:
    try:
        text = file.read_text().strip()
    except FileNotFoundError:
        if file.name == "memory.high":  # younger than the rest
            return _UNLIMITED
        raise
    return _UNLIMITED if text == "max" else int(text)
