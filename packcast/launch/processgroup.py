"""torch process groups: made over a store and a network interface, closed within a time limit.

Knows no launchers and no control channel.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

from packcast.control.time_limit import within
from packcast.errors import PackcastError, RendezvousError, first_line
from packcast.launch.reach import check_ring, ephemeral_ports
from packcast.packed.unfinished import keep, release_ended

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import BroadcastOptions, Store, Work

_GLOO_LIMIT_S = 60.0
_LOOK_UP_EVERY = timedelta(seconds=0.1)


class Group(Protocol):
    """The part of a process group that the data phase needs."""

    def broadcast(self, tensors: list[torch.Tensor], opts: BroadcastOptions) -> Work:
        """Enqueue a broadcast of one tensor, in place."""


def open_process_group(
    backend: Literal["nccl", "gloo"],
    *,
    rank: int,
    world_size: int,
    store: Store,
    device: torch.device,
    timeout_s: float,
    interface: str | None,
    check: Callable[[], object],
) -> Group:
    """Make a process group of our own; all ranks call this with the same store, and it waits.

    It is independent of torch.distributed's default group and in none of torch's tables: nothing
    global changes. gloo and NCCL use `interface` unless the environment names one. `timeout_s` is
    a backstop: the watch over the ranks must be faster. Raises RendezvousError if the ranks do
    not connect, and what `check` raises while it waits, if the transfer has failed.
    """
    from torch._C._distributed_c10d import PrefixStore

    release_ended()
    own = PrefixStore("group", store)
    timeout = timedelta(seconds=timeout_s)
    try:
        if backend == "nccl":
            check_ring(
                rank=rank,
                world_size=world_size,
                store=own,
                timeout_s=timeout_s,
                interface=interface,
                check=check,
            )
            return _nccl_group(own, rank, world_size, timeout, device, interface)
        return _gloo_group(own, rank, world_size, timeout, interface, check)
    except RuntimeError as error:  # torch's DistError and its kin
        where = f" over {interface}" if interface else ""
        raise RendezvousError(
            f"the {backend} process group could not be created{where}: {first_line(error)}",
            hint=f"choose another network interface with {_INTERFACE_VARIABLES[backend]}",
        ) from error


def broadcast_over(
    group: Group, failure: Callable[[], PackcastError | None]
) -> Callable[[torch.Tensor, int], None]:
    """The group's broadcast of a tensor from a root rank.

    On a GPU it is ordered on the current stream; on a CPU it has ended on return. While gloo
    blocks, `failure` is polled and raised: gloo itself would block until its connections end. The
    group is kept until they do.
    """
    from torch._C._distributed_c10d import BroadcastOptions

    def broadcast(tensor: torch.Tensor, root: int) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        options.asyncOp = False
        work = group.broadcast([tensor], options)
        if not tensor.is_cuda:
            _await(group, tensor, work, failure)
        elif work is not None:  # NCCL's may be: then it went onto the current stream itself
            work.wait()

    return broadcast


def _await(
    group: Group, tensor: torch.Tensor, work: Work, failure: Callable[[], PackcastError | None]
) -> None:
    while True:
        try:
            work.wait(_LOOK_UP_EVERY)
            return
        except RuntimeError:
            error = failure()
            if work.is_completed():
                work.wait()  # it has ended meanwhile, or this is its own error
                return
            if error is not None:
                keep(work, group, tensor)
                raise error from None


def begin_close(group: Group, device: torch.device) -> threading.Event:
    """Shut NCCL's group down in the background, since it takes half a second, and can hang.

    Every collective must have ended, and every rank should call this. The event is set at the
    end; if it is not, a thread is stuck. gloo's group ends with its last reference.
    """
    return _in_background("packcast-close", group, device, ("shutdown", "_shutdown"))


def begin_abort(group: Group, device: torch.device) -> threading.Event:
    """Abort NCCL's collectives, in the background, so that threads waiting for a GPU go on.

    gloo has no abort, and waits for it poll.
    """
    return _in_background("packcast-abort", group, device, ("abort",))


def _in_background(
    name: str, group: Group, device: torch.device, methods: tuple[str, ...]
) -> threading.Event:
    import torch
    import torch.distributed as dist

    done = threading.Event()
    if isinstance(group, dist.ProcessGroupGloo):
        done.set()
        return done

    held = [group]

    def act() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # By name: torch 2.6 has another.
            next(getattr(held[0], method) for method in methods if hasattr(held[0], method))()
            if "abort" in methods and device.type == "cuda":
                torch.cuda.synchronize(device)  # until nothing of it is in flight any more
        finally:
            # Before the event: if the interpreter ends while torch's destructors run on a thread
            # that is not the main one, the process aborts.
            held.clear()
            done.set()

    threading.Thread(target=act, name=name, daemon=True).start()
    return done


def _gloo_group(
    store: Store,
    rank: int,
    world_size: int,
    timeout: timedelta,
    interface: str | None,
    check: Callable[[], object],
) -> Group:
    import torch.distributed as dist

    gloo: Any = dist.ProcessGroupGloo
    options = gloo_options(timeout, interface)
    # All ranks are about to do this, and gloo itself would try as long as a collective may take.
    limit_s = min(timeout.total_seconds() + 1.0, _GLOO_LIMIT_S)
    group: tuple[Group] | None = within(
        limit_s, "packcast-gloo", lambda: gloo(store, rank, world_size, options), check=check
    )
    if group is None:
        raise RuntimeError(
            f"some rank does not answer within {limit_s:g} s; does a firewall block the ports of"
            f" net.ipv4.ip_local_port_range, {ephemeral_ports()} here?"
        )
    return group[0]


def gloo_options(timeout: timedelta, interface: str | None, connections: int = 1) -> Any:
    """The options of a gloo group, with `connections` to a peer for each interface.

    Collectives take turns on the connections, each of which has its own threads.
    """
    import torch.distributed as dist

    gloo: Any = dist.ProcessGroupGloo
    named = os.environ.get(_INTERFACE_VARIABLES["gloo"]) or interface or ""
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [
        gloo.create_device(interface=name) if name else gloo.create_default_device()
        for name in named.split(",") * connections
    ]
    options._threads = 2 * len(options._devices)  # torch's own number
    return options


def _nccl_group(
    store: Store,
    rank: int,
    world_size: int,
    timeout: timedelta,
    device: torch.device,
    interface: str | None,
) -> Group:
    import torch.distributed as dist

    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    options.group_name = "packcast"
    options.global_ranks_in_group = list(range(world_size))
    with environment_with(interface_variable("nccl", interface)):
        with environment_with(NCCL_GROUP_VARIABLES):  # read while it is made, and not again
            made = nccl(store, rank, world_size, options)
        made.eager_connect_single_device(device)  # as init_process_group does, given a device
    group: Group = made
    return group


# For torch's NCCL groups. The control channel handles lost ranks: NCCL's own watchdog would abort
# this process with a C++ stack, in the middle of its clean-up.
NCCL_GROUP_VARIABLES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


def interface_variable(backend: Literal["nccl", "gloo"], interface: str | None) -> dict[str, str]:
    """The variable that selects the network interface for a group while it connects."""
    if not interface:
        return {}
    # NCCL matches prefixes (eth1 for eth10 too) unless the value begins with "=".
    exactly = "=" if backend == "nccl" else ""
    return {_INTERFACE_VARIABLES[backend]: exactly + interface}


@contextmanager
def environment_with(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set variables that the environment does not have, for the duration of the block.

    For C++ libraries, such as torch and NCCL, that have no option instead. A program started
    meanwhile with the process's own environment inherits them; `os.environ` does not change. With
    several threads, a variable stays until the last of them has left the block.
    """
    with _environment_lock:
        held = [name for name in wanted if name in _holders or not _has_variable(name)]
        for name in held:
            _holders[name] += 1
            if _holders[name] == 1:
                os.putenv(name, wanted[name])
    try:
        yield
    finally:
        with _environment_lock:
            for name in held:
                _holders[name] -= 1
                if not _holders[name]:
                    del _holders[name]
                    if name not in os.environ:  # else it was set meanwhile
                        os.unsetenv(name)


_environment_lock = threading.Lock()
_holders: Counter[str] = Counter()  # by variable that `environment_with` has added
_libc = ctypes.CDLL(None)
_libc.getenv.argtypes, _libc.getenv.restype = [ctypes.c_char_p], ctypes.c_char_p


def _has_variable(name: str) -> bool:
    """Whether C++ code sees the variable; it may see more than `os.environ` has."""
    return name in os.environ or _libc.getenv(os.fsencode(name)) is not None


_INTERFACE_VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
