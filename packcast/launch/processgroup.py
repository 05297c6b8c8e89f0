"""The torch process group: made over a given store and interface, taken down within a bound.

Knows nothing of launchers or of the control channel; errors of peers are that channel's business.
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

from packcast.errors import PackcastError, RendezvousError
from packcast.launch.time_limit import within
from packcast.packed.unfinished import keep, release_ended

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import BroadcastOptions, Store, Work

_GLOO_LIMIT_S = 60.0
_LOOK_UP_EVERY = timedelta(seconds=0.1)


class Group(Protocol):
    """What the data phase needs of a process group, whether it is one of torch's or our own."""

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
) -> Group:
    """Make a process group of our own; all ranks call this with the same store, and it waits.

    It stands beside torch.distributed's default group, which may be there or not, and is in none
    of torch's tables: nothing global changes. gloo and NCCL talk over `interface` unless the
    environment names one. `timeout_s` is a backstop: whoever watches the ranks must be faster.
    Raises RendezvousError where the ranks do not connect.
    """
    from torch._C._distributed_c10d import PrefixStore

    release_ended()
    own = PrefixStore("group", store)
    timeout = timedelta(seconds=timeout_s)
    try:
        if backend == "nccl":
            return _nccl_group(own, rank, world_size, timeout, device, interface)
        return _gloo_group(own, rank, world_size, timeout, interface)
    except RuntimeError as error:  # torch's DistError and its kin
        reason = str(error).splitlines()[0]
        where = f" over {interface}" if interface else ""
        raise RendezvousError(
            f"the {backend} process group could not be created{where}: {reason}",
            hint=f"choose another network interface with {_INTERFACE_VARIABLES[backend]}",
        ) from error


def broadcast_over(
    group: Group, failure: Callable[[], PackcastError | None]
) -> Callable[[torch.Tensor, int], None]:
    """The group's broadcast of a tensor from a rank of it: on a GPU ordered on the current stream,
    on a CPU over when it returns.

    A thread that waits for gloo looks up now and then, and raises the `failure` if there is one:
    gloo itself would keep it until its connections end. The group is kept then until they do.
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
    """Take the group down: NCCL's in the background, since it takes half a second, and can hang.

    Every collective must have ended, and every rank should call this. The event comes when it is
    done; if it does not, a thread is stuck. gloo's ends with whoever holds it last.
    """
    return _in_background("packcast-close", group, device, ("shutdown", "_shutdown"))


def begin_abort(group: Group, device: torch.device) -> threading.Event:
    """Break NCCL's collectives, in the background, so that who waits for a GPU goes on.

    gloo has no such thing, and who waits for it need not.
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
            # Before anybody goes on: torch's destructors, met by the end of the interpreter on
            # a thread that is not the main one, abort the process.
            held.clear()
            done.set()

    threading.Thread(target=act, name=name, daemon=True).start()
    return done


def _gloo_group(
    store: Store, rank: int, world_size: int, timeout: timedelta, interface: str | None
) -> Group:
    import torch.distributed as dist

    gloo: Any = dist.ProcessGroupGloo
    options = gloo_options(timeout, interface)
    # All ranks are about to do this, and gloo itself would try as long as a collective may take.
    limit_s = min(timeout.total_seconds() + 1.0, _GLOO_LIMIT_S)
    group: tuple[Group] | None = within(
        limit_s, "packcast-gloo", lambda: gloo(store, rank, world_size, options)
    )
    if group is None:
        raise RuntimeError(
            f"some rank does not answer within {limit_s:g} s; does a firewall block the ports of"
            " net.ipv4.ip_local_port_range?"
        )
    return group[0]


def gloo_options(timeout: timedelta, interface: str | None, connections: int = 1) -> Any:
    """What a gloo group is made with: its collectives take turns on so many connections to a peer,
    each of which has threads of its own. As many for each interface that the environment names."""
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


# For torch's NCCL groups. A lost peer is the control channel's to tell: NCCL's own watchdog would
# abort this process with a C++ stack, in the middle of its clean-up.
NCCL_GROUP_VARIABLES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


def interface_variable(backend: Literal["nccl", "gloo"], interface: str | None) -> dict[str, str]:
    """What names the network interface to a group of this kind while it connects."""
    if not interface:
        return {}
    # NCCL takes a name for a prefix (eth1 for eth10 too) unless it is told otherwise.
    exactly = "=" if backend == "nccl" else ""
    return {_INTERFACE_VARIABLES[backend]: exactly + interface}


@contextmanager
def environment_with(wanted: Mapping[str, str]) -> Iterator[None]:
    """These variables, where the environment does not say otherwise, and for as long only.

    For C++ libraries that read them from nowhere else, as torch and NCCL do: there is no option
    in their place. They are in the process's own environment, so that a program which is started
    meanwhile without an environment of its own inherits them; `os.environ` stays as it is. Where
    several threads are in here, a variable stays until the last of them has left.
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
                    if name not in os.environ:  # or somebody has set it meanwhile
                        os.unsetenv(name)


_environment_lock = threading.Lock()
_holders: Counter[str] = Counter()  # by variable that `environment_with` has added
_libc = ctypes.CDLL(None)
_libc.getenv.argtypes, _libc.getenv.restype = [ctypes.c_char_p], ctypes.c_char_p


def _has_variable(name: str) -> bool:
    """Whether C++ sees it, which may know more of them than `os.environ`."""
    return name in os.environ or _libc.getenv(os.fsencode(name)) is not None


_INTERFACE_VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
