"""What can broadcast: a torch process group or an object with `broadcast(tensor, src=...)`."""

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
    """A group for the ring: the device of its tensors and its one collective.

    `rank` and `world_size` are None if a bare communicator has none. `broadcast` takes the root's
    rank within the group.
    """

    device: torch.device
    broadcast: Broadcast
    rank: int | None
    world_size: int | None

    def check_src(self, src: int, *, sends: bool) -> None:
        """Raise UsageError unless `src` is a rank of the group; this rank iff it sends."""
        if not isinstance(src, int) or src < 0:
            raise UsageError(f"src is {src!r}, which is no rank", hint=_SRC_HINT)
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
    """The communicator of a torch group, a torch backend or a bare object.

    Tensors belong on the GPU if torch's group has NCCL; for a bare object on its `device`, else on
    the `device` given here, else on the current GPU if there is one. Raises UsageError for what
    cannot broadcast, or not on the `device` that is given.
    """
    # torch's first: they have a `broadcast` with other arguments.
    if isinstance(group, dist.ProcessGroup | Backend):
        communicator = _of_process_group(group)
    else:
        communicator = _of_bare(group, device)
    if device is not None and (wanted := _with_index(torch.device(device))) != communicator.device:
        raise UsageError(
            f"device is {wanted}, but the group's tensors belong on {communicator.device}",
            hint="leave device out, or give a group of that device",
        )
    return communicator


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
            _copy_result(result, tensor)  # an engine's stateless group returns what it received
        elif isinstance(result, Work):
            result.wait()

    own: Any = getattr(bare, "device", None)
    if own is None:
        own = device
    if own is None:
        own = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world_size = _integer_of(bare, "rank"), _integer_of(bare, "world_size")
    return Communicator(_with_index(torch.device(own)), broadcast, rank, world_size)


def _refuse_disabled(bare: Any) -> None:
    # `is`: a proxy object may return something for every name.
    if getattr(bare, "disabled", False) is True or getattr(bare, "available", True) is False:
        raise UsageError(
            f"this {type(bare).__name__} is disabled: its broadcast does nothing",
            hint="enable it, or use a group of more than one rank where its library is found",
        )


def _copy_result(result: torch.Tensor, tensor: torch.Tensor) -> None:
    if result.nbytes != tensor.nbytes:
        raise TransferError(
            f"the group's broadcast returned {result.nbytes} bytes where {tensor.nbytes} were"
            " expected"
        )
    tensor.copy_(result.view(tensor.dtype).view(tensor.shape))


def _integer_of(bare: Any, name: str) -> int | None:
    value = getattr(bare, name, None)
    if callable(value):
        value = value()
    return value if isinstance(value, int) else None


def _of_process_group(group: Any) -> Communicator:
    """Of a torch group or backend, by its own methods: torch's tables do not list every group, and
    use the ranks of a default group, which may not exist.
    """
    reference = _reference_to(group)

    def broadcast(tensor: torch.Tensor, root: int) -> None:
        alive = reference()
        if alive is None:
            raise UsageError("the process group has been destroyed", hint="make a new one first")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        options.asyncOp = False
        work = alive.broadcast([tensor], options)
        if work is not None:  # NCCL's may be None: it has been enqueued on the current stream
            work.wait()

    device = torch.device("cuda" if _has_nccl(group) else "cpu")
    return Communicator(_with_index(device), broadcast, group.rank(), group.size())


def _has_nccl(group: Any) -> bool:
    if isinstance(group, Backend):
        return bool(group.name() == "nccl")
    try:
        return bool(group._get_backend(torch.device("cuda")).name() == "nccl")
    except RuntimeError:  # no backend for GPUs
        return False


def _reference_to(group: Any) -> Callable[[], Any]:
    """Weak if torch holds the group until it is destroyed: gloo's threads end with the group, and
    abort the process if they outlive the interpreter.
    """
    try:
        dist.get_process_group_ranks(group)
    except KeyError:  # this may be the only reference
        return lambda: group
    return weakref.ref(group)


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
