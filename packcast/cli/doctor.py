"""`packcast doctor`: describe this machine, find problems, and run a self-test.

Imports torch only for the checks that need it.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import packcast
from packcast.cli.result import count, ending
from packcast.cli.selftest import kernels_fault, self_test
from packcast.cli.tables import Listing
from packcast.cli.terminal import printable
from packcast.control.addresses import (
    addresses_here,
    connect,
    host_and_port,
    interface_of,
    interface_towards,
    is_loopback,
    resolve,
    text_of,
)
from packcast.errors import PackcastError, RendezvousError
from packcast.io import native
from packcast.io.memory import memory_limits
from packcast.io.pool import pool_kind
from packcast.launch.devices import has_gpu_driver, host_name
from packcast.launch.fitting import CUDA_AND_NCCL_NBYTES, NEARLY_FULL_GPU
from packcast.launch.gpumemory import free_nbytes
from packcast.packed.plan import ring_nbytes
from packcast.settings import DEFAULT_NUM_BUFFERS, DEFAULT_STAGING, MAX_FITTING_SIZE
from packcast.units import format_size

State = Literal["ok", "note", "problem"]

_MARKS: dict[State, str] = {"ok": "ok  ", "note": "note", "problem": "BAD "}
_WANTED_FILES = 4096
_LITTLE_SPACE = 1 << 30
_REACH_LIMIT_S = 5.0
_VARIABLES = ("PACKCAST_", "NCCL_", "GLOO_", "TORCH_NCCL_", "MASTER_", "HF_HOME", "HF_HUB_CACHE")
_SECRET = "PACKCAST_TOKEN"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that was looked at; `fix` is what to do about it."""

    topic: str
    state: State
    text: str
    fix: str | None = None


def doctor(
    folders: Sequence[Path],
    *,
    reach: tuple[str, int] | None,
    tests: bool,
    tell: Callable[[str], None],
) -> tuple[Listing, PackcastError | None]:
    """Run all checks and pass on each finding as it comes; the error is that of a self-test, or
    says that something else is a problem."""
    findings: list[Diagnosis] = []
    failure: PackcastError | None = None

    def take(found: Diagnosis) -> None:
        findings.append(found)
        tell(line_of(found))

    looks = [versions(), pool(), devices(), network(), limits(), space(folders), variables()]
    if reach is not None:
        looks.append(reachable(*reach))
    for look in looks:
        for found in look:
            take(found)
    for found in kernels() if tests else ():
        take(found)
    for backend in _backends() if tests else []:
        tell(f"      {'self-test':<11} two ranks over {backend} ...")
        text, failed = self_test(backend)
        fix = None
        if failed is not None:
            fix = failed.hint or f"try it by hand: packcast send CKPT --nproc 2 --backend {backend}"
        take(Diagnosis("self-test", "problem" if failed else "ok", text, fix))
        failure = failure or failed
    problems = [it for it in findings if it.state == "problem"]
    if problems and failure is None:
        failure = RendezvousError(f"{problems[0].topic}: {problems[0].text}", hint=problems[0].fix)
    document: dict[str, object] = {
        **ending("doctor", failure),
        "findings": [asdict(found) for found in findings],
    }
    notes = sum(found.state == "note" for found in findings)
    found_what = f"{count(len(problems), 'problem')}, {count(notes, 'note')}"
    text = found_what if problems or notes else "no problem found"
    return Listing(text, document, ()), failure


def line_of(found: Diagnosis) -> str:
    """A finding as text, with the fix on a line of its own."""
    line = f"{_MARKS[found.state]}  {found.topic:<11} {found.text}"
    return printable(f"{line}\n{'':18}-> {found.fix}" if found.fix else line)


def versions() -> Iterator[Diagnosis]:
    """Of all that takes part."""
    names = ["torch", "safetensors", "xxhash"]
    found = [f"{name} {version}" for name in names if (version := version_of(name))]
    nccl = nccl_version()
    where = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    text = ", ".join([f"packcast {packcast.__version__}", *found, f"NCCL {nccl or 'none'}", where])
    yield Diagnosis("versions", "ok", text)


def version_of(distribution: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def nccl_version() -> str | None:
    """Of the NCCL that torch's wheel comes with, without importing torch."""
    for cuda in ("cu13", "cu12", "cu11"):
        version = version_of(f"nvidia-nccl-{cuda}")
        if version:
            return version
    return None


def pool() -> Iterator[Diagnosis]:
    """Which I/O threads read and write."""
    if pool_kind() == "native":
        yield Diagnosis("I/O threads", "ok", "native")
        return
    reason, hint = native.installed(), "install packcast again where there is a C compiler"
    if not isinstance(reason, str):
        reason, hint = "PACKCAST_POOL asks for them", "unset PACKCAST_POOL"
    yield Diagnosis("I/O threads", "note", f"Python's, which are slower: {reason}", hint)


def devices() -> Iterator[Diagnosis]:
    """Every GPU that torch sees, with its free memory."""
    yield Diagnosis("host", "ok", f"{host_name()}, {len(os.sched_getaffinity(0))} CPUs")
    if not has_gpu_driver():
        yield Diagnosis("GPUs", "ok", "no driver; transfers go over gloo, through host memory")
        return
    import torch

    if not torch.cuda.is_available():
        yield Diagnosis(
            "GPUs",
            "note",
            f"there is a driver, but torch {torch.__version__} uses no GPU",
            "install a torch built for CUDA that fits the driver; look at CUDA_VISIBLE_DEVICES",
        )
        return
    num_gpus = torch.cuda.device_count()
    needed = ring_nbytes(MAX_FITTING_SIZE, DEFAULT_NUM_BUFFERS)
    told = f"buffers take {format_size(needed)}, CUDA and NCCL {format_size(CUDA_AND_NCCL_NBYTES)}"
    frees = free_nbytes([str(torch.cuda.get_device_properties(i).uuid) for i in range(num_gpus)])
    for index, free in enumerate(frees):
        found = torch.cuda.get_device_properties(index)
        room = "an unknown part" if free is None else format_size(free)
        short = free is not None and free < needed + CUDA_AND_NCCL_NBYTES
        yield Diagnosis(
            "GPUs",
            "note" if short else "ok",
            f"cuda:{index} {found.name}, {room} of {format_size(found.total_memory)} free",
            f"{told}: {NEARLY_FULL_GPU}" if short else None,
        )


def kernels() -> Iterator[Diagnosis]:
    """Whether the GPU kernels work here; the first try compiles them."""
    if not _has_gpus():
        return
    fault = kernels_fault()
    if fault is None:
        yield Diagnosis("GPU kernels", "ok", "compiled by Triton")
        return
    text = f"none, so sums and small tensors take many times as long: {fault}"
    fix = "Triton needs a C compiler (CC names one, without options) and a cache directory"
    yield Diagnosis("GPU kernels", "note", text, fix)


def network() -> Iterator[Diagnosis]:
    """The addresses of this host, and which interface a transfer would use."""
    found = addresses_here()
    if not found:
        yield Diagnosis(
            "network",
            "note",
            "loopback only: other hosts cannot reach this one",
            "for transfers on this host that is enough",
        )
    for place, address in enumerate(found):
        first = ", used unless --listen names another" if place == 0 else ""
        yield Diagnosis("network", "ok", f"{interface_of(address)} {address}{first}")
    name = socket.gethostname()
    try:
        named = sorted({text_of(address) for *_, address in resolve(name, 0)})
    except OSError as error:
        yield Diagnosis(
            "name",
            "note",
            f"{name} does not resolve here ({error.strerror})",
            "listen on an address instead of the name",
        )
        return
    if found and all(map(is_loopback, named)):
        yield Diagnosis(
            "name",
            "note",
            f"{name} is {', '.join(named)} here, which other hosts cannot reach",
            f"--listen {found[0]}:29400, or change /etc/hosts",
        )
    else:
        yield Diagnosis("name", "ok", f"{name} is {', '.join(named)}")


def reachable(host: str, port: int) -> Iterator[Diagnosis]:
    """Whether this host resolves and reaches HOST:PORT; no process need listen there yet."""
    where = host_and_port(host, port)
    try:
        found = sorted({text_of(address) for *_, address in resolve(host, port)})
    except OSError as error:
        fix = "use the address, or correct the name service (/etc/hosts, DNS)"
        yield Diagnosis("reach", "problem", f"{host} has no address: {error.strerror}", fix)
        return
    over = interface_towards(found[0])
    yield Diagnosis("reach", "ok", f"{host} is {', '.join(found)}, by way of {over or 'nothing'}")
    try:
        connect(host, port, _REACH_LIMIT_S).close()
    except ConnectionRefusedError:
        text = f"{where} is reachable; no process listens there now"
        yield Diagnosis("reach", "ok", text)
    except OSError as error:
        text = f"{where}: {error.strerror or f'no answer in {_REACH_LIMIT_S:g} s'}"
        fix = "a firewall between the hosts may block that port"
        yield Diagnosis("reach", "problem", text, fix)
    else:
        yield Diagnosis("reach", "ok", f"{where} answers")


def limits() -> Iterator[Diagnosis]:
    """Limits of this process: open files and locked memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < _WANTED_FILES
    fix = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}" if few else None
    yield Diagnosis("open files", "note" if few else "ok", f"at most {soft:,}", fix)
    yield pinned()
    yield from memory()


def pinned() -> Diagnosis:
    """The limit on locked memory. NVIDIA's driver pins pages itself, and asks no such limit; but
    InfiniBand's does, for what NCCL registers there."""
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "unlimited" if locked == resource.RLIM_INFINITY else format_size(locked)
    low = locked != resource.RLIM_INFINITY and locked < DEFAULT_STAGING and has_infiniband()
    return Diagnosis(
        "pinned",
        "note" if low else "ok",
        f"locked memory at most {told} (ulimit -l), which NCCL over InfiniBand comes under;"
        " staging for GPUs does not",
        "ulimit -l unlimited, or docker run --ulimit memlock=-1" if low else None,
    )


def has_infiniband() -> bool:
    """Whether there is a device that NCCL might use."""
    return os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband"))


def memory() -> Iterator[Diagnosis]:
    """What each limit leaves, beside what one rank takes: its staging, or its ring on a CPU."""
    needed = max(ring_nbytes(MAX_FITTING_SIZE, DEFAULT_NUM_BUFFERS), DEFAULT_STAGING)
    for limit in memory_limits():
        low = limit.free < 2 * needed
        yield Diagnosis(
            "memory",
            "note" if low else "ok",
            f"{limit.name} leaves {format_size(limit.free)}; a rank takes up to"
            f" {format_size(needed)}",
            "smaller --buffer-size and --staging, or raise that limit" if low else None,
        )


def space(folders: Sequence[Path]) -> Iterator[Diagnosis]:
    """Room where copies may go; and in /dev/shm, which NCCL between GPUs of one host uses."""
    for folder in folders:
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            text = f"{folder}: {(error.strerror or str(error)).lower()}"
            yield Diagnosis("space", "problem", text, "give a directory that exists")
            continue
        text = f"{format_size(free)} free at {folder.resolve()}"
        if not os.access(folder, os.W_OK):
            yield Diagnosis("space", "problem", f"{text}, which is not writable", "choose another")
        else:
            yield Diagnosis("space", "note" if free < _LITTLE_SPACE else "ok", text)
    shared = Path("/dev/shm")
    if has_gpu_driver() and shared.is_dir() and shutil.disk_usage(shared).free < 64 << 20:
        yield Diagnosis(
            "space", "problem", "/dev/shm is full", "docker run --ipc=host, or --shm-size"
        )


def variables() -> Iterator[Diagnosis]:
    """Environment variables that affect a transfer; secrets are not shown."""
    names = sorted(name for name in os.environ if name.startswith(_VARIABLES))
    shown = (f"{name}={'...' if name == _SECRET else os.environ[name]}" for name in names)
    yield Diagnosis("environment", "ok", " ".join(shown) or "no variable that matters here is set")


def _backends() -> list[str]:
    return ["gloo", "nccl"] if _has_gpus(2) else ["gloo"]


def _has_gpus(least: int = 1) -> bool:
    if not has_gpu_driver():
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= least


def version_line() -> str:
    """For --version, which imports no torch."""
    parts = [f"{pool_kind()} I/O threads", f"torch {version_of('torch') or 'none'}"]
    nccl = nccl_version()
    if nccl:
        parts.append(f"NCCL {nccl}")
    python = ".".join(map(str, sys.version_info[:3]))
    return f"packcast {packcast.__version__} ({', '.join([*parts, f'Python {python}'])})"
