"""Connects a chain of ranks hop by hop: two of one host by their memory, others by a gloo group."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packcast.control.rank_info import MAX_NAME_LENGTH, printable
from packcast.control.time_limit import within
from packcast.errors import RendezvousError, UsageError, first_line
from packcast.launch.devices import boot_id, host_name
from packcast.launch.processgroup import gloo_options
from packcast.launch.reach import await_key, ephemeral_ports, meet
from packcast.packed import memory_hop
from packcast.packed.unfinished import release_ended

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from packcast.packed.chain import Hop

_CHOICE = "PACKCAST_HOPS"
_SHARED = "shared"
_ANSWER_LIMIT_S = 5.0
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

    Two ranks of one host share memory unless the kernel forbids it, or PACKCAST_HOPS is `gloo`.
    Returns the hop towards this rank and the one from it; None where no chunk passes. All ranks
    call this with the same arguments and store, and it waits for the neighbours. `connections` is
    1 in every transfer: two are not faster on loopback. Raises RendezvousError if they do not
    connect, and what `check` raises during the wait: why the transfer has failed, if it has.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    from packcast.packed.chain import GlooHop
    from packcast.packed.chain_order import hops_of

    release_ended()
    gloo: Any = dist.ProcessGroupGloo
    ends: dict[bool, Hop] = {}
    with ExitStack() as undoing:
        for upstream, downstream in hops_of(order, roots):
            if rank not in (upstream, downstream):
                continue
            is_upstream = rank == upstream
            neighbour = downstream if is_upstream else upstream
            own = PrefixStore(f"hop-{upstream}-{downstream}", store)
            try:
                host, hop = _meet(own, rank, neighbour, is_upstream, timeout_s, check)
                if hop is None:
                    options = gloo_options(timedelta(seconds=timeout_s), interface, connections)
                    connect = partial(gloo, own, int(not is_upstream), 2, options)
                    # gloo itself would try to connect for as long as a collective may take.
                    group = within(_CONNECT_LIMIT_S, "packcast-hop", connect, check=check)
                    if group is not None:
                        hop = GlooHop(group[0], len(options._devices), is_upstream)
            except RuntimeError as error:  # torch's DistError and its kin
                raise RendezvousError(
                    f"rank {upstream} and rank {downstream} could not be connected over gloo:"
                    f" {first_line(error)}",
                    hint="choose another network interface with GLOO_SOCKET_IFNAME",
                ) from error
            if hop is None:
                raise _blocked({rank: host_name(), neighbour: host}, interface)
            ends[is_upstream] = hop
            undoing.callback(hop.close)
        undoing.pop_all()
    return ends.get(False), ends.get(True)


class _Introduction(BaseModel):
    """What a rank tells its neighbour; `socket` is where the one upstream listens."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    host: Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
    boot_id: Annotated[str, Field(max_length=MAX_NAME_LENGTH)] = ""
    socket: Annotated[str, Field(max_length=64)] = ""


def _meet(
    store: Store,
    rank: int,
    neighbour: int,
    is_upstream: bool,
    timeout_s: float,
    check: Callable[[], object],
) -> tuple[str, Hop | None]:
    """The neighbour's host, and the hop to it if it shares this one's memory."""
    listener, name = None, ""
    wanted = hop_kind() != "gloo"
    with suppress(OSError):
        if wanted and is_upstream:
            listener, name = memory_hop.listen()
    here = boot_id() if wanted and (name or not is_upstream) else ""
    own = _Introduction(host=printable(host_name())[:MAX_NAME_LENGTH], boot_id=here, socket=name)
    try:
        said = meet(store, rank, neighbour, timeout_s, check, own.model_dump_json())
        try:
            other = _Introduction.model_validate_json(said)
        except ValidationError:
            other = _Introduction(host=said[:MAX_NAME_LENGTH])
        hop: Hop | None = None
        if here and other.boot_id == here:
            hop = (
                _accepted(store, listener, timeout_s, check)
                if listener is not None
                else _connected(store, other.socket, check)
            )
        return printable(other.host), hop
    finally:
        if listener is not None:
            listener.close()


def _connected(store: Store, name: str, check: Callable[[], object]) -> Hop | None:
    """Downstream: try, and say whether it works."""
    hop = memory_hop.connect(name, _ANSWER_LIMIT_S, check)
    store.set(_SHARED, "no" if hop is None else "yes")
    return hop


def _accepted(
    store: Store, listener: socket.socket, timeout_s: float, check: Callable[[], object]
) -> Hop | None:
    """Upstream: let the neighbour try, and wait for what it says."""
    hop: memory_hop.GivingHop | None = None

    def answer() -> None:
        nonlocal hop
        check()
        hop = hop or memory_hop.accept(listener)

    try:
        await_key(store, _SHARED, "the neighbour", timeout_s, answer)
        is_shared = store.get(_SHARED) == b"yes"
    except BaseException:
        if hop is not None:
            hop.close()
        raise
    if hop is not None and not is_shared:
        hop.close()
        hop = None
    return hop


def hop_kind() -> str:
    """`auto`, or `gloo` where PACKCAST_HOPS says so; raises UsageError for another word."""
    kind = os.environ.get(_CHOICE, "auto")
    if kind not in ("auto", "gloo"):
        raise UsageError(f"{_CHOICE} is {kind!r}", hint="say gloo or auto")
    return kind


def _blocked(hosts: dict[int, str], interface: str | None) -> RendezvousError:
    ends = " and ".join(f"rank {rank} ({hosts[rank]})" for rank in sorted(hosts))
    on = f" on {interface}" if interface else ""
    return RendezvousError(
        f"{ends} could not be connected over gloo{on} within {_CONNECT_LIMIT_S:g} s: no answer",
        hint="does a firewall block it? gloo listens on ports of net.ipv4.ip_local_port_range,"
        f" {ephemeral_ports()} here; GLOO_SOCKET_IFNAME chooses another network interface",
    )
