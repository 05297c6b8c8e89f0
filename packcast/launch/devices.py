"""Which rank gets which GPU, and so which backend.

`assign_devices` is a pure function over all ranks' infos; only `visible_gpus` asks torch.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packcast.errors import RendezvousError

if TYPE_CHECKING:  # pydantic is not imported for a host's name
    from packcast.control.rank_info import RankInfo

_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows' Linux


@dataclass(frozen=True, slots=True)
class Assignment:
    """Each rank's device: `cpu`, or `cuda:i` by the rank's own numbering.

    `reason` is a phrase for the start line; `loud` if GPUs stay unused although no option asked
    for that.
    """

    backend: Literal["nccl", "gloo"]
    devices: dict[int, str]
    reason: str
    loud: bool


def host_name() -> str:
    """This host's name, for messages; `boot_id` identifies hosts."""
    return socket.gethostname()


def boot_id() -> str:
    """The same for all processes of one running kernel, containers included; unique to it.

    NCCL_HOSTID is appended: with it NCCL takes ranks to be on different hosts and lets them share
    a GPU, which is how several ranks are tested on a machine with one.
    """
    host_id = os.environ.get("NCCL_HOSTID", "")
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + host_id
    except OSError:
        return host_name() + host_id


def has_gpu_driver() -> bool:
    """Whether there may be GPUs, without asking torch."""
    return any(map(os.path.exists, _DRIVERS))


def visible_gpus() -> tuple[str, ...]:
    """The UUIDs of the GPUs this process may use, in CUDA's order; empty if there are none.

    Asking initialises the driver but makes no context on any GPU (torch makes one with the first
    allocation or stream), so ranks do not leave 500 MB each on GPU 0.
    """
    if not has_gpu_driver():
        return ()  # and torch need not be imported
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return ()
    count = torch.cuda.device_count()
    return tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))


def assign_devices(
    members: Sequence[RankInfo], backend: Literal["auto", "nccl", "gloo"]
) -> Assignment:
    """NCCL if every rank can have a GPU of its own, else gloo on CPU buffers. Pure.

    Every member has its rank. Raises RendezvousError only if an explicit option cannot be met:
    `backend` nccl, or a member's `--device cuda`.
    """
    wants_gpu = next((m for m in members if m.device.startswith("cuda")), None)
    wants_cpu = next((m for m in members if m.device == "cpu"), None)
    if wants_gpu and wants_cpu:
        raise RendezvousError(
            f"{wants_gpu.label} asks for --device {wants_gpu.device},"
            f" but {wants_cpu.label} for --device cpu",
            hint="use GPUs on all ranks, or on none",
        )
    if backend == "gloo":
        if wants_gpu:
            raise RendezvousError(
                f"{wants_gpu.label} asks for --device {wants_gpu.device},"
                " but --backend gloo works on CPU buffers",
                hint="leave out one of the two options",
            )
        return _on_cpus(members, "as asked by --backend gloo", loud=False)
    if wants_cpu:
        if backend == "nccl":
            raise RendezvousError(
                f"--backend nccl needs GPUs, but {wants_cpu.label} asks for --device cpu",
                hint="leave out one of the two options",
            )
        return _on_cpus(members, f"{wants_cpu.label} asks for --device cpu", loud=False)
    return _on_gpus_if_possible(members, demand=_demand(backend, wants_gpu))


def _demand(backend: str, wants_gpu: RankInfo | None) -> str | None:
    if backend == "nccl":
        return "--backend nccl"
    return f"{wants_gpu.label}'s --device {wants_gpu.device}" if wants_gpu else None


def _on_gpus_if_possible(members: Sequence[RankInfo], demand: str | None) -> Assignment:
    owners = _match(members)
    gpus = {member.rank: gpu for gpu, member in owners.items()}
    without = next((member for member in members if member.rank not in gpus), None)
    if without is None:
        devices = {m.known_rank: f"cuda:{m.gpus.index(gpus[m.rank][1])}" for m in members}
        return Assignment("nccl", devices, "every rank has a GPU of its own", loud=False)
    reason = _why_none(without, owners)
    if demand:
        raise RendezvousError(
            f"{demand} is not possible: {reason}",
            hint="NCCL needs a GPU of its own for every rank; --backend auto falls back to gloo",
        )
    if not any(member.gpus for member in members):
        return _on_cpus(members, "no rank sees a GPU", loud=False)
    return _on_cpus(members, f"GPUs stay unused since {reason}", loud=True)


def _why_none(member: RankInfo, owners: dict[tuple[str, str], RankInfo]) -> str:
    if not member.gpus:
        return f"{member.label} sees no GPU"
    index = _fixed_index(member)
    if index is not None:
        if index >= len(member.gpus):
            return f"{member.label} asks for --device {member.device}, but sees {_gpus(member)}"
        owner = owners[member.boot_id, member.gpus[index]]
        return f"{member.label} and {owner.label} ask for the same GPU, {member.gpus[index]}"
    # It accepts any GPU, so all that it sees are assigned, and no owner can move.
    return f"{member.label} sees {_gpus(member)}, all given to other ranks of its host"


def _gpus(member: RankInfo) -> str:
    return f"{len(member.gpus)} GPU{'' if len(member.gpus) == 1 else 's'}"


def _match(members: Sequence[RankInfo]) -> dict[tuple[str, str], RankInfo]:
    """A GPU for as many ranks as possible: (boot id, uuid) -> its owner.

    Explicit requests first, then each rank's preferred GPU, then any free one; a rank loses its
    preferred GPU only if another rank would have none (augmenting paths).
    """
    owners: dict[tuple[str, str], RankInfo] = {}
    placed: set[int] = set()
    for candidates_of in (_fixed, _preferred):
        for member in members:
            free = (gpu for gpu in candidates_of(member) if gpu not in owners)
            gpu = next(free, None)
            if gpu and member.known_rank not in placed:
                owners[gpu] = member
                placed.add(member.known_rank)
    for member in members:
        if member.known_rank not in placed:
            _augment(member, owners, seen=set())
    return owners


def _augment(
    member: RankInfo, owners: dict[tuple[str, str], RankInfo], seen: set[tuple[str, str]]
) -> bool:
    candidates = [gpu for gpu in _allowed(member) if gpu not in seen]
    for gpu in sorted(candidates, key=lambda gpu: gpu in owners):  # free ones first; stable
        if gpu in seen:
            continue
        seen.add(gpu)
        if gpu not in owners or _augment(owners[gpu], owners, seen):
            owners[gpu] = member
            return True
    return False


def _allowed(member: RankInfo) -> list[tuple[str, str]]:
    if _fixed_index(member) is not None:
        return _fixed(member)
    return [(member.boot_id, gpu) for gpu in member.gpus]


def _fixed(member: RankInfo) -> list[tuple[str, str]]:
    index = _fixed_index(member)
    return [] if index is None else _nth(member, index)


def _preferred(member: RankInfo) -> list[tuple[str, str]]:
    if member.local_rank is None or _fixed_index(member) is not None:
        return []
    # A launcher that shows each rank one GPU only: local rank 3's is its number 0.
    return _nth(member, member.local_rank if len(member.gpus) > 1 else 0)


def _fixed_index(member: RankInfo) -> int | None:
    match = re.fullmatch(r"cuda:(\d+)", member.device)
    return int(match[1]) if match else None


def _nth(member: RankInfo, index: int) -> list[tuple[str, str]]:
    return [(member.boot_id, gpu) for gpu in member.gpus[index : index + 1]]


def _on_cpus(members: Sequence[RankInfo], reason: str, *, loud: bool) -> Assignment:
    return Assignment("gloo", {member.known_rank: "cpu" for member in members}, reason, loud)
