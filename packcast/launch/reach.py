"""Whether ranks reach each other: they wait for their neighbours, and try a connection to them.

NCCL tries to connect for minutes, names no rank and cannot be stopped. A plain connection to each
rank's next, over the same interface and to a port of the same range, says within seconds what a
firewall would stop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packcast.control.addresses import (
    REACH_LIMIT_S,
    connect,
    host_and_port,
    interfaces,
    listening_socket,
    with_interface,
)
from packcast.control.rank_info import MAX_NAME_LENGTH, printable
from packcast.errors import RendezvousError
from packcast.launch.devices import host_name

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LONGEST_PAUSE_S = 0.1
_NCCL_DEFAULTS = ("ib", "^docker,lo,virbr", "docker", "lo")  # what NCCL tries, one after the other


class _Listener(BaseModel):
    """Where a rank listens; no address where it does not know which interface will be used."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    host: Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
    address: Annotated[str, Field(pattern=r"^[0-9A-Fa-f.:]{2,45}(%.{1,15})?$")] | None
    port: Annotated[int, Field(ge=0, le=65535)]


def check_ring(
    *,
    rank: int,
    world_size: int,
    store: Store,
    timeout_s: float,
    interface: str | None,
    check: Callable[[], object],
) -> None:
    """Connect to the next rank, as NCCL is about to, and let the one before connect to this one.

    All ranks call this with the same store, and it waits for both neighbours. Raises
    RendezvousError where this rank cannot connect to the next one, and what `check` raises while
    it waits: also why another rank could not connect to this one.
    """
    name, address = _nccl_address(interface)
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    try:
        listener = listening_socket(with_interface(address, name), 0) if address else None
    except OSError as error:
        raise RendezvousError(f"cannot listen on {address} on {name}: {error.strerror}") from None
    try:
        port = listener.getsockname()[1] if listener else 0
        own = _Listener(host=_own_name(), address=address, port=port)
        said = meet(store, rank, after, timeout_s, check, own.model_dump_json())
        try:
            other = _Listener.model_validate_json(said)
        except ValidationError:
            raise RendezvousError(f"rank {after} does not say where it listens") from None
        _try(rank, after, other, name)
        store.set(f"reached-{after}", "")
        await_key(store, f"reached-{rank}", f"rank {before}", timeout_s, check)
    finally:
        if listener is not None:
            listener.close()


def _try(rank: int, after: int, other: _Listener, name: str | None) -> None:
    if other.address is None:
        return
    address = with_interface(other.address, name)
    try:
        connect(address, other.port, REACH_LIMIT_S).close()
    except OSError as error:
        no_answer = isinstance(error, TimeoutError)
        reason = f"no answer within {REACH_LIMIT_S:g} s" if no_answer else error.strerror or error
        on = f" on {name}" if name else ""
        raise RendezvousError(
            f"rank {rank} ({_own_name()}) cannot connect to rank {after} ({printable(other.host)})"
            f" at {host_and_port(address, other.port)}{on}, as NCCL would: {reason}",
            hint="does a firewall block it? NCCL listens on ports of"
            f" net.ipv4.ip_local_port_range, {ephemeral_ports()} here; NCCL_SOCKET_IFNAME chooses"
            " another network interface",
        ) from None


def meet(
    store: Store,
    rank: int,
    neighbour: int,
    timeout_s: float,
    check: Callable[[], object],
    own: str,
) -> str:
    """Wait until the neighbour is about to connect, too; returns its text, as `own` is this rank's.

    A rank that waits in gloo's or NCCL's constructor cannot be told that a rank has died; and torch
    writes to standard error if a wait in a store exceeds its limit. The returned text is not
    authenticated.
    """
    check()  # after a failure do not let a neighbour connect and wait
    store.set(f"here-{rank}", own)
    await_key(store, f"here-{neighbour}", f"rank {neighbour}", timeout_s, check)
    return store.get(f"here-{neighbour}").decode(errors="replace")


def await_key(
    store: Store, key: str, whom: str, timeout_s: float, check: Callable[[], object]
) -> None:
    """Wait until `whom` has set the key, calling `check` meanwhile, which may raise; RuntimeError
    at the limit."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.002
    while True:
        check()  # once there is a failure the store may go with its host
        if store.check([key]):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{whom} has not come within {timeout_s:g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def ephemeral_ports() -> str:
    """The range from which the kernel chooses ports, as it does for gloo and NCCL."""
    try:
        return "-".join(_PORT_RANGE.read_text().split())
    except OSError:
        return "32768-60999"  # the kernel's default


def _own_name() -> str:
    return printable(host_name())[:MAX_NAME_LENGTH]


def _nccl_address(interface: str | None) -> tuple[str | None, str | None]:
    """The interface that NCCL's bootstrap will use and its address, (None, None) if unknown."""
    wanted = os.environ.get("NCCL_SOCKET_IFNAME") or (f"={interface}" if interface else None)
    families = {"AF_INET": 4, "AF_INET6": 6}
    family = families.get(os.environ.get("NCCL_SOCKET_FAMILY", ""))
    here = [
        (name, address)
        for address, name in interfaces()
        if family in (None, 6 if ":" in address else 4)
    ]
    names = [name for name, _ in here]
    choices = (chosen_by_nccl(each, names) for each in ([wanted] if wanted else _NCCL_DEFAULTS))
    chosen = next((name for name in choices if name is not None), None)
    return next((pair for pair in here if pair[0] == chosen), (None, None))


def chosen_by_nccl(wanted: str, names: Iterable[str]) -> str | None:
    """The first of `names` that NCCL_SOCKET_IFNAME allows: a list of prefixes, after `=` of names,
    after `^` of those that it does not."""
    excludes, exactly = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    entries = wanted.lstrip("^=").split(",")

    def listed(name: str) -> bool:
        # An entry's port, as in eth0:1234, is the old way to give the root's one.
        plain = (entry.partition(":")[0] for entry in entries)
        return any(name == entry if exactly else name.startswith(entry) for entry in plain)

    return next((name for name in names if listed(name) != excludes), None)
