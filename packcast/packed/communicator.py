"""What can broadcast: a torch process group, or any object with `broadcast(tensor, src=...)`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend, BroadcastOptions, Work

from packcast.errors import TransferError, UsageError
from packcast.packed.ring import Broadcast


@dataclass(frozen=True, slots=True)
class Communicator:
    """A group seen from the ring: where its tensors have to be, and its one collective.

    `rank` and `world_size` are None where a bare communicator does not tell them. `broadcast`
    takes the root's rank within the group.
    """

    device: torch.device
    broadcast: Broadcast
    rank: int | None
    world_size: int | None

    def check_src(self, src: int, *, sends: bool) -> None:
        """Raise UsageError unless `src` is a rank of the group: this one's where it sends."""
        if not isinstance(src, int) or src < 0:
            raise UsageError(f"src is {src!r}, which is no rank")
        if self.world_size is not None and src >= self.world_size:
            what = f"the group has the ranks 0 to {self.world_size - 1}"
        elif self.rank is None or (src == self.rank) == sends:
            return
        elif sends:
            what = f"this rank, which sends, is {self.rank} in the group"
        else:
            what = "that is this rank, which receives"
        raise UsageError(f"src is {src}, but {what}", hint=_SRC_HINT)


_SRC_HINT = (
    "src is the sender's rank within the group: of a global rank,"
    " torch.distributed.get_group_rank(group, rank)"
)


def communicator_of(group: object, device: torch.device | str | int | None = None) -> Communicator:
    """Ask first whether it is torch's: that has a `broadcast` with other arguments.

    Its tensors belong on the GPU where torch's group has NCCL; a bare communicator's on its
    `device`, else on the one given, else on the current GPU if there is one. Raises UsageError for
    what cannot broadcast, or not on the `device` that is given.
    """
    if isinstance(group, dist.ProcessGroup | Backend):
        made = _of_process_group(group)
    else:
        made = _of_bare(group, device)
    if device is not None and (wanted := _with_index(torch.device(device))) != made.device:
        raise UsageError(
            f"device is {wanted}, but the group's tensors belong on {made.device}",
            hint="leave device out, or give a group of that device",
        )
    return made


def _of_bare(group: object, device: torch.device | str | int | None) -> Communicator:
    bare: Any = group
    if not callable(getattr(bare, "broadcast", None)):
        raise UsageError(
            f"a {type(group).__name__} cannot broadcast",
            hint="give a torch.distributed process group, or an object with broadcast(tensor, src)",
        )
    _refuse_disabled(bare)

    def broadcast(tensor: torch.Tensor, root: int) -> None:
        _refuse_disabled(bare)  # some are enabled for a while only
        result = bare.broadcast(tensor, src=root)
        if isinstance(result, torch.Tensor) and result.data_ptr() != tensor.data_ptr():
            _take(result, tensor)  # an engine's stateless group returns what it has received
        elif isinstance(result, Work):
            result.wait()

    own: Any = getattr(bare, "device", None)
    if own is None:
        own = device
    if own is None:
        own = "cuda" if torch.cuda.is_available() else "cpu"
    return Communicator(
        _with_index(torch.device(own)),
        broadcast,
        _told(bare, "rank"),
        _told(bare, "world_size"),
    )


def _refuse_disabled(bare: Any) -> None:
    # Compared with the very values: a stand-in may answer to any name.
    if getattr(bare, "disabled", False) is True or getattr(bare, "available", True) is False:
        raise UsageError(
            f"this {type(bare).__name__} is disabled: its broadcast does nothing",
            hint="enable it, or use a group of more than one rank where its library is found",
        )


def _take(result: torch.Tensor, tensor: torch.Tensor) -> None:
    if result.nbytes != tensor.nbytes:
        raise TransferError(
            f"the group's broadcast returned {result.nbytes} bytes where {tensor.nbytes} were"
            " expected"
        )
    tensor.copy_(result.view(tensor.dtype).view(tensor.shape))


def _told(bare: Any, name: str) -> int | None:
    value = getattr(bare, name, None)
    if callable(value):
        value = value()
    return value if isinstance(value, int) else None


def _of_process_group(group: Any) -> Communicator:
    """A group or a backend of torch's, by what it says itself: torch's tables know only what was
    made with them, and count from the default group, which there need not be.
    """
    known = _reference_to(group)

    def broadcast(tensor: torch.Tensor, root: int) -> None:
        alive = known()
        if alive is None:
            raise UsageError("the process group has been destroyed")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        options.asyncOp = False
        work = alive.broadcast([tensor], options)
        if work is not None:  # NCCL's may be: then it went onto the current stream itself
            work.wait()

    device = torch.device("cuda" if _has_nccl(group) else "cpu")
    return Communicator(_with_index(device), broadcast, group.rank(), group.size())


def _has_nccl(group: Any) -> bool:
    if isinstance(group, Backend):
        return bool(group.name() == "nccl")
    try:
        return bool(group._get_backend(torch.device("cuda")).name() == "nccl")
    except RuntimeError:  # it has none for GPUs
        return False


def _reference_to(group: Any) -> Callable[[], Any]:
    """Weak where torch holds the group until it is destroyed: then it has to go, since gloo's
    threads, which end with it, abort the process where they outlive the interpreter.
    """
    try:
        dist.get_process_group_ranks(group)
    except KeyError:  # nobody but us may be holding it
        return lambda: group
    return weakref.ref(group)


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
