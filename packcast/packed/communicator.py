"""What can broadcast: a torch process group, or any object with `broadcast(tensor, src=...)`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from packcast.errors import UsageError
from packcast.packed.ring import Broadcast


@dataclass(frozen=True, slots=True)
class Communicator:
    """A group seen from the ring: where its tensors have to be, and its one collective.

    `rank` and `world_size` are None where a bare communicator does not tell them.
    """

    device: torch.device
    broadcast: Broadcast
    rank: int | None
    world_size: int | None


def communicator_of(group: object) -> Communicator:
    """Ask first whether it is a process group: that has a `broadcast` with other arguments.

    A bare communicator's tensors belong on its `device`, else on the current GPU if there is one.
    Raises UsageError for what cannot broadcast.
    """
    if isinstance(group, dist.ProcessGroup):
        return _of_process_group(group)
    bare: Any = group
    if not callable(getattr(bare, "broadcast", None)):
        raise UsageError(
            f"a {type(group).__name__} cannot broadcast",
            hint="give a torch.distributed process group, or an object with broadcast(tensor, src)",
        )
    device = getattr(bare, "device", None)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Communicator(
        _with_index(torch.device(device)),
        lambda tensor, root: bare.broadcast(tensor, src=root),
        getattr(bare, "rank", None),
        getattr(bare, "world_size", None),
    )


def _of_process_group(group: dist.ProcessGroup) -> Communicator:
    # Not get_backend(): of a group made without naming a backend it says "undefined".
    on_gpu = "nccl" in dist.get_backend_config(group)
    # torch holds it until it is destroyed, and then it has to go: gloo's threads, which end with
    # it, abort the process where they outlive the interpreter.
    known = weakref.ref(group)

    def broadcast(tensor: torch.Tensor, root: int) -> None:
        group = known()
        if group is None:
            raise UsageError("the process group has been destroyed")
        dist.broadcast(tensor, src=dist.get_global_rank(group, root), group=group)

    return Communicator(
        _with_index(torch.device("cuda" if on_gpu else "cpu")),
        broadcast,
        dist.get_rank(group),
        dist.get_world_size(group),
    )


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
