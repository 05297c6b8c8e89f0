"""Connects a chain of ranks hop by hop: a gloo group of two ranks for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from packcast.control.rank_info import MAX_NAME_LENGTH, printable
from packcast.control.time_limit import within
from packcast.errors import RendezvousError
from packcast.launch.devices import host_name
from packcast.launch.processgroup import gloo_options
from packcast.launch.reach import ephemeral_ports, meet
from packcast.packed.unfinished import release_ended

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from packcast.packed.chain import Hop

_CONNECT_LIMIT_S = 15.0  # once both are about to connect, which takes milliseconds


def open_hops(
    order: Sequence[int],
    roots: Collection[int],
    *,
    rank: int,
    store: Store,
    timeout_s: float,
    interface: str | None,
    check: Callable[[], object],
    connections: int = 1,
) -> tuple[Hop | None, Hop | None]:
    """Connect this rank to its neighbours in the chains from `roots`.

    Returns the hop towards this rank and the one from it; None where no chunk passes. All ranks
    call this with the same arguments and store, and it waits for the neighbours. `connections` is
    1 in every transfer: two are not faster on loopback. Raises RendezvousError if they do not
    connect, and what `check` raises during the wait: why the transfer has failed, if it has.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    from packcast.packed.chain import Hop
    from packcast.packed.chain_order import hops_of

    release_ended()
    gloo: Any = dist.ProcessGroupGloo
    ends: dict[bool, Hop] = {}
    for upstream, downstream in hops_of(order, roots):
        if rank not in (upstream, downstream):
            continue
        is_upstream = rank == upstream
        neighbour = downstream if is_upstream else upstream
        own = PrefixStore(f"hop-{upstream}-{downstream}", store)
        try:
            said = meet(own, rank, neighbour, timeout_s, check, printable(host_name()))
            host = printable(said)[:MAX_NAME_LENGTH]
            options = gloo_options(timedelta(seconds=timeout_s), interface, connections)
            connect = partial(gloo, own, int(not is_upstream), 2, options)
            # gloo itself would try to connect for as long as a collective may take.
            group = within(_CONNECT_LIMIT_S, "packcast-hop", connect, check=check)
        except RuntimeError as error:  # torch's DistError and its kin
            raise RendezvousError(
                f"rank {upstream} and rank {downstream} could not be connected over gloo:"
                f" {str(error).splitlines()[0]}",
                hint="choose another network interface with GLOO_SOCKET_IFNAME",
            ) from error
        if group is None:
            raise _blocked({rank: host_name(), neighbour: host}, interface)
        ends[is_upstream] = Hop(group[0], len(options._devices), is_upstream)
    return ends.get(False), ends.get(True)


def _blocked(hosts: dict[int, str], interface: str | None) -> RendezvousError:
    ends = " and ".join(f"rank {rank} ({hosts[rank]})" for rank in sorted(hosts))
    on = f" on {interface}" if interface else ""
    return RendezvousError(
        f"{ends} could not be connected over gloo{on} within {_CONNECT_LIMIT_S:g} s: no answer",
        hint="does a firewall block it? gloo listens on ports of net.ipv4.ip_local_port_range,"
        f" {ephemeral_ports()} here; GLOO_SOCKET_IFNAME chooses another network interface",
    )
