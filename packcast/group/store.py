"""The key-value store through which ranks find the sender, before the control channel is there.

Roles and one address go through it, never bulk data. torch is imported when a store is opened.
A TCPStore ignores its own time-outs while its host is frozen, and says a broken connection in
thirty lines of C++ stack: so ports are tried with plain sockets first, keys are polled rather
than waited for, and whatever can block does so on a thread of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from packcast.errors import PackcastError, RendezvousError, error_from_code
from packcast.group.bounded import within
from packcast.group.launch import Launch, first_host, slurm_nodelist, slurm_port
from packcast.units import format_duration

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_GRACE_S = 5.0  # beyond its own deadline a store call is held to be stuck
_SLOWEST_POLL_S = 0.2
_MAX_NAMED_RANKS = 8


def open_store(
    launch: Launch,
    environ: Mapping[str, str],
    timeout_s: float,
    port: int | None = None,
    *,
    call: int = 0,
) -> Store:
    """The launcher's store, or under Slurm one hosted by rank 0. Every rank calls this.

    Does not wait for the other ranks, only (up to `timeout_s`) for the store's host. `port` goes
    before the one derived from the Slurm step; `call` counts the transfers of this launch, each of
    which has keys of its own. Raises RendezvousError where the port is taken or the host does not
    answer.
    """
    if launch.kind == "slurm":
        host = first_host(slurm_nodelist(environ))
        address = host, port or slurm_port(environ)
        agent_store = False
    else:
        address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        agent_store = _is_agents(environ)
    if agent_store:
        store = _agents_store(launch, address, timeout_s)
    elif launch.rank == 0:
        option = "--port" if launch.kind == "slurm" else "--master-port (MASTER_PORT)"
        store = _own_store(address, timeout_s, option)
    else:
        store = connect_store(*address, timeout_s)
    return _of_this_call(store, environ, call)


def serve_store(host: str, timeout_s: float) -> tuple[Store, int]:
    """Host a store on a free port of `host`'s interface only; returns it and the port.

    A store has no authentication, hence one interface. Its host must be the last to leave.
    """
    return _serve((host, 0), timeout_s, every_interface=False, option="--listen")


def connect_store(host: str, port: int, timeout_s: float) -> Store:
    """A client of the store at `host:port`, once something listens there."""
    from torch._C._distributed_c10d import TCPStore

    deadline = time.monotonic() + timeout_s
    _await_listener(host, port, deadline)
    return _answer_in(
        max(deadline - time.monotonic(), _GRACE_S),
        f"the store at {host}:{port} does not answer",
        lambda: TCPStore(
            host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False
        ),
    )


def settle_sender(
    store: Store, launch: Launch, role: Literal["send", "recv"], timeout_s: float
) -> int:
    """The lowest rank that ran `send`; every rank calls this with its own role.

    Returns as soon as that is certain: ranks above the sender need not have come. Raises
    RendezvousError if no rank sends, or naming those still missing at the deadline; or the
    failure that another rank published.
    """
    ranks = range(launch.world_size)

    def settled() -> int | None:
        for rank in ranks:
            if not store.check([_role_key(rank)]):
                return None
            if store.get(_role_key(rank)) == b"send":
                return rank
        raise RendezvousError(
            "no rank ran `packcast send`",
            hint="one launch must run `packcast send CKPT`, the others `packcast recv`",
        )

    def nobody() -> str:
        missing = [rank for rank in ranks if not store.check([_role_key(rank)])]
        named = ", ".join(map(str, missing[:_MAX_NAMED_RANKS]))
        more = len(missing) - _MAX_NAMED_RANKS
        verb = "has" if len(missing) == 1 else "have"
        return (
            f"{'rank' if len(missing) == 1 else 'ranks'} {named}"
            f"{f' and {more} more' if more > 0 else ''} {verb} not joined"
            f" within {format_duration(timeout_s)}"
        )

    def post_and_settle() -> int:
        store.set(_role_key(launch.rank), role)
        return _poll(store, settled, nobody, timeout_s)

    return _answer_in(timeout_s, "the launcher's store does not answer", post_and_settle)


def publish_address(store: Store, address: tuple[str, int]) -> None:
    """The sender says where its control channel listens."""
    text = json.dumps({"host": address[0], "port": address[1]})
    _answer_in(
        _GRACE_S, "the launcher's store does not answer", lambda: store.set(_ADDRESS_KEY, text)
    )


def publish_failure(store: Store, error: PackcastError) -> None:
    """Tell the ranks that still wait in `settle_sender` or `await_address`; never raises."""
    text = json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint})
    try:
        _answer_in(_GRACE_S, "no answer", lambda: store.set(_FAILURE_KEY, text))
    except (PackcastError, RuntimeError):
        return  # the launcher ends the others, or their own deadline does


def leave_last(store: Store, launch: Launch, environ: Mapping[str, str], limit_s: float) -> None:
    """The way out of a join that failed, where rank 0 hosts the store; every rank calls this.

    Rank 0 stays until the others have read why, but no longer than `limit_s`: without the store
    they could only time out. Never raises.
    """
    if launch.kind == "torchrun" and _is_agents(environ):
        return
    others = [f"gone/{rank}" for rank in range(1, launch.world_size)]

    def go() -> None:
        if launch.rank:
            store.set(f"gone/{launch.rank}", "")
            return
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not all(store.check([key]) for key in others):
            time.sleep(_SLOWEST_POLL_S / 4)

    with contextlib.suppress(PackcastError, RuntimeError):
        _answer_in(limit_s, "no answer", go)


def _is_agents(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def await_address(store: Store, timeout_s: float) -> tuple[str, int]:
    """The control channel's (host, port), for every rank but the sender.

    Raises the sender's own error where it failed first, RendezvousError at the deadline.
    """

    def published() -> tuple[str, int] | None:
        if not store.check([_ADDRESS_KEY]):
            return None
        address = json.loads(store.get(_ADDRESS_KEY))
        return str(address["host"]), int(address["port"])

    def silence() -> str:
        return f"the sender has not said where it listens within {format_duration(timeout_s)}"

    return _answer_in(
        timeout_s,
        "the launcher's store does not answer",
        lambda: _poll(store, published, silence, timeout_s),
    )


_ADDRESS_KEY = "address"
_FAILURE_KEY = "failure"


def _role_key(rank: int) -> str:
    return f"role/{rank}"


def _of_this_call(store: Store, environ: Mapping[str, str], call: int) -> Store:
    """Keys of our own: an agent's store outlives restarts of its workers, old addresses in it."""
    from torch._C._distributed_c10d import PrefixStore

    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"packcast/{restart}/{call}", store)


_own_stores: dict[tuple[str, int], Store] = {}


def _own_store(address: tuple[str, int], timeout_s: float, option: str) -> Store:
    """Rank 0's, hosted for as long as the process lives: another rank may come for the next
    transfer before rank 0 has done with this one."""
    import torch.distributed as dist

    if address not in _own_stores:
        try:
            _own_stores[address], _ = _serve(
                address, timeout_s, every_interface=True, option=option
            )
        except RendezvousError:
            if not dist.is_initialized():
                raise
            # The port is most likely taken by the default group's own store, which serves as well.
            return connect_store(*address, timeout_s)
    return _own_stores[address]


def _agents_store(launch: Launch, address: tuple[str, int], timeout_s: float) -> Store:
    """torchrun's own store, by way of torch's rendezvous, which knows the agent's habits."""
    from torch.distributed.rendezvous import rendezvous

    deadline = time.monotonic() + timeout_s
    _await_listener(*address, deadline)

    def meet() -> Store:
        pair = rendezvous(
            "env://", launch.rank, launch.world_size, timeout=timedelta(seconds=timeout_s)
        )
        store: Store = next(iter(pair))[0]
        return store

    host, port = address
    return _answer_in(
        max(deadline - time.monotonic(), _GRACE_S),
        f"the launcher's store at {host}:{port} does not answer",
        meet,
    )


def _serve(
    address: tuple[str, int], timeout_s: float, *, every_interface: bool, option: str
) -> tuple[Store, int]:
    """Host a store on a socket bound here, where a taken port has an error of its own."""
    from torch._C._distributed_c10d import TCPStore

    host, port = address
    try:
        listener = _listener(None if every_interface else host, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise RendezvousError(
            f"cannot serve the store at {host}:{port}: "
            f"{'the port is taken' if taken else error.strerror or error}",
            hint=f"choose another port with {option}" if taken else None,
        ) from None
    port = listener.getsockname()[1]
    store = _answer_in(
        timeout_s,
        f"cannot reach my own store at {host}:{port}",
        lambda: TCPStore(
            host,
            port,
            None,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,  # it would wait for ranks without being able to name them
            master_listen_fd=listener.detach(),
            use_libuv=False,  # in torch 2.6 that one takes no socket of ours
        ),
    )
    return store, port


def _listener(host: str | None, port: int) -> socket.socket:
    if host is None and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    if host is None:
        return socket.create_server(("", port))
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server((str(address[0]), port), family=family)


def _await_listener(host: str, port: int, deadline: float) -> None:
    pause_s = 0.02
    while True:
        try:
            with socket.create_connection((host, port), max(deadline - time.monotonic(), 0.1)):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() + pause_s > deadline:
            raise RendezvousError(f"cannot reach the store at {host}:{port}: {reason}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def _poll(
    store: Store, found: Callable[[], T | None], silence: Callable[[], str], timeout_s: float
) -> T:
    """`found()` once it is not None; another rank's failure or `silence()` as an error else."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.005
    while True:
        if store.check([_FAILURE_KEY]):
            failure = json.loads(store.get(_FAILURE_KEY))
            raise error_from_code(failure["code"], failure["message"], failure["hint"])
        value = found()
        if value is not None:
            return value
        if time.monotonic() > deadline:
            raise RendezvousError(silence())
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _SLOWEST_POLL_S)


def _answer_in(limit_s: float, complaint: str, call: Callable[[], T]) -> T:
    """What `call` returns or raises; RendezvousError if it is still stuck a grace after the limit.

    The stuck thread stays behind: it holds the store's lock, so the process can only leave.
    """
    try:
        result = within(limit_s + _GRACE_S, "packcast-store", call)
    except RuntimeError as error:  # torch's DistError and its kin
        raise RendezvousError(f"{complaint}: {str(error).splitlines()[0]}") from None
    if result is None:
        raise RendezvousError(complaint)
    return result[0]
