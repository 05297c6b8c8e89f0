"""What the kernel says of the host's memory, and of the control groups that limit it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from packcast.io.memory import MemoryLimit, available_nbytes, memory_limits
from packcast.units import GIB, MIB
from tests.helpers.cgroups import control_group, inside


class Kernel:
    """A /proc and its control groups, made of files: `proc` is where it tells of itself."""

    def __init__(self, root: Path) -> None:
        self.proc, self.mount = root / "proc", root / "cgroup fs"
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()

    def has(self, mib: int) -> None:
        lines = f"MemTotal: 999999 kB\nMemAvailable:    {mib * 1024} kB\nBuffers:  1 kB\n"
        (self.proc / "meminfo").write_text(lines)

    def is_in(self, path: str, *, version: int, root: str = "/") -> None:
        """This process is in the group `path`; of the hierarchy `root` is what is mounted."""
        mount = str(self.mount).replace(" ", "\\040")
        cgroups = {2: f"0::{path}", 1: f"4:cpu,memory:{path}\n0::/elsewhere"}
        mounts = {
            2: f"31 23 0:28 {root} {mount} rw shared:9 - cgroup2 cgroup2 rw",
            1: f"35 31 0:32 {root} {mount} rw,relatime - cgroup cgroup rw,cpu,memory",
        }
        (self.proc / "self" / "cgroup").write_text(f"3:cpuset:/\n{cgroups[version]}\n")
        others = "32 31 0:29 / /nowhere rw - cgroup cgroup rw,cpuset\n22 1 8:1 / / rw - ext4 /d rw"
        (self.proc / "self" / "mountinfo").write_text(f"{others}\n{mounts[version]}\n")

    def group(self, path: str, **files: object) -> Path:
        """A group with its files: `memory_max=1` is `memory.max`."""
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            text = (
                "\n".join(f"{k} {v}" for k, v in content.items())
                if isinstance(content, dict)
                else str(content)
            )
            (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")
        return folder

    def left(self) -> list[int]:
        """In MiB, the tightest first."""
        return [limit.free // MIB for limit in memory_limits(self.proc)]


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    made = Kernel(tmp_path)
    made.has(9000)
    return made


def v2(limit: object, used_mib: int, *, cached_mib: int = 0) -> dict[str, object]:
    half = cached_mib * MIB // 2
    return {
        "memory_max": limit,
        "memory_current": used_mib * MIB,
        "memory_stat": {"anon": 1, "file": 2, "inactive_file": half, "active_file": half},
    }


def test_what_is_available_is_told_in_bytes_or_not_at_all(tmp_path: Path) -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    lines = ["MemTotal:       131072 kB", "MemAvailable:     4097 kB", "Buffers:  1 kB"]
    (tmp_path / "meminfo").write_text("\n".join(lines))
    assert available_nbytes(tmp_path) == 4097 * 1024
    (tmp_path / "meminfo").write_text("\n".join([lines[0], lines[2]]))  # a kernel before 3.14
    assert available_nbytes(tmp_path) is None
    (tmp_path / "meminfo").unlink()
    assert available_nbytes(tmp_path) is None
    assert 0 < (available_nbytes() or 0) < total


def test_a_limit_leaves_what_is_not_used_and_the_file_cache_counts_as_free(kernel: Kernel) -> None:
    kernel.is_in("/job", version=2)
    kernel.group("job", **v2(4 * GIB, 3900, cached_mib=3000))
    first, host = memory_limits(kernel.proc)
    assert first.free == 4 * GIB - 900 * MIB
    assert first.name == f"the limit of 4.0 GiB in {kernel.mount}/job/memory.max"
    assert (host.key, host.free, host.name) == ("host", 9000 * MIB, "this host's memory")
    assert available_nbytes(kernel.proc) == first.free


def test_the_groups_above_limit_it_too(kernel: Kernel) -> None:
    kernel.is_in("/pods/pod1/box", version=2)
    kernel.group("pods", **v2("max", 8000))
    kernel.group("pods/pod1", **v2(2 * GIB, 1548))
    kernel.group("pods/pod1/box", **v2(3 * GIB, 72))
    kernel.group("pods/other", **v2(1, 1))
    assert kernel.left() == [500, 3000, 9000]
    # Where it is throttled, it has no more either.
    kernel.group("pods/pod1/box", memory_high=100 * MIB)
    assert kernel.left() == [28, 500, 9000]
    assert "memory.high" in memory_limits(kernel.proc)[0].name


def test_a_group_of_the_first_version_is_understood(kernel: Kernel) -> None:
    kernel.is_in("/docker/abc", version=1)
    files = {"memory_usage_in_bytes": 700 * MIB, "memory_stat": {"total_inactive_file": 50 * MIB}}
    kernel.group("", memory_limit_in_bytes=9223372036854771712, **files)
    kernel.group("docker/abc", memory_limit_in_bytes=GIB, **files)
    assert kernel.left() == [374, 9000]


@pytest.mark.parametrize(
    ("path", "root"),
    [("/docker/abc", "/docker/abc"), ("/docker/abc", "/other"), ("/", "/"), ("/../x", "/")],
    ids=["its own group is mounted", "a host's path", "a namespace", "a moved process"],
)
def test_in_a_container_the_mount_is_its_group(path: str, root: str, kernel: Kernel) -> None:
    kernel.is_in(path, version=2, root=root)
    kernel.group("", **v2(GIB, 24))
    assert kernel.left() == [1000, 9000]


@pytest.mark.parametrize("broken", ["memory.max", "memory.current", "memory.stat"])
def test_what_is_not_as_it_should_be_is_no_limit(broken: str, kernel: Kernel) -> None:
    kernel.is_in("/job", version=2)
    folder = kernel.group("job", **v2(GIB, 24))
    (folder / broken).write_text("a b c\n")
    assert kernel.left() == [9000]
    (folder / broken).unlink()
    assert kernel.left() == [9000]
    (kernel.proc / "self" / "mountinfo").write_text("nonsense\n")
    assert kernel.left() == [9000]


def test_processes_of_one_group_name_it_alike_and_others_do_not(kernel: Kernel) -> None:
    keys = set()
    for box in ("a", "b", "a"):
        kernel.group(f"job/{box}", **v2(GIB, 24))
        kernel.group("job", **v2(2 * GIB, 24))
        kernel.is_in(f"/job/{box}", version=2)
        keys.add(tuple(limit.key for limit in memory_limits(kernel.proc)))
    (_, above, host), (_, other_above, other_host) = keys
    assert (above, host) == (other_above, other_host)
    assert len({key for found in keys for key in found}) == 4


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of this machine, with a limit of 1 GiB."""
    with control_group(GIB) as group:
        yield group


def test_a_real_groups_limit_is_met(real_group: Path) -> None:
    program = (
        "import json; from dataclasses import asdict; from packcast.io.memory import memory_limits;"
        "print(json.dumps([asdict(limit) for limit in memory_limits()]))"
    )
    argv = inside(real_group, sys.executable, "-c", program)
    said = subprocess.run(argv, check=True, capture_output=True, timeout=60)
    first = json.loads(said.stdout)[0]
    assert 0.8 * GIB < first["free"] <= GIB
    assert first["name"].startswith(f"the limit of 1.0 GiB in {real_group}/memory.")
    there = os.stat(real_group)
    assert first["key"] == f"{there.st_dev}:{there.st_ino}"
    assert MemoryLimit(**first) == MemoryLimit(**asdict(MemoryLimit(**first)))
