"""Where the ranks of a launch find the sender, before the control channel is there.

Roles and one address go through a store, never bulk data. Keys are polled rather than waited for:
a store's own time-outs cannot be relied on (see store.py).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from packcast.control.addresses import (
    host_and_port,
    interface_of,
    is_literal,
    is_loopback,
    resolve,
    source_towards,
    text_of,
    with_interface,
)
from packcast.errors import PackcastError, RendezvousError, error_from_code
from packcast.launch.handover import LOOPBACK
from packcast.launch.launchers import Launch, rendezvous_address
from packcast.launch.secret import Keys, SignedKeys, launch_context
from packcast.launch.store import GRACE_S, answer_in, await_listener, connect_store, host_store
from packcast.units import format_duration

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_SLOWEST_POLL_S = 0.2
_MAX_NAMED_RANKS = 8
_NO_ANSWER = "the launcher's store does not answer"


@dataclass(frozen=True, slots=True)
class SenderAddress:
    """Where the sender's control channel listens: at one of `hosts`, the likeliest first.

    Where it is `beside_store` that is also the host of the launcher's store, which every rank has
    reached by an address of its own.
    """

    hosts: tuple[str, ...]
    port: int
    beside_store: bool = False


class Rendezvous:
    """The launcher's store while the ranks find each other, from `open_rendezvous` until `close`.

    Either the launcher's own, or one that rank 0 hosts at the launcher's address, for so long only:
    a trainer's own init_process_group wants that port afterwards. Who calls holds this object and
    not the store in it, since the frames of an exception would keep the port taken.

    Where keys are signed, those that this rank has set are set again if a stranger has changed
    them.
    """

    def __init__(
        self,
        store: SignedKeys,
        address: tuple[str, int],
        link: socket.socket | None,
        *,
        is_agents: bool = False,
    ) -> None:
        self._store: SignedKeys | None = store
        self._link = link
        self._mine: dict[str, str] = {}
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None
        self.is_agents = is_agents
        self.host = address[0]
        self.here = None if link is None else text_of(link.getsockname())
        self.there = None if link is None else text_of(link.getpeername())

    @property
    def is_here(self) -> bool:
        """Whether the store is on this very host."""
        if self.here is None or self.there is None:
            return True
        return self.here == self.there or is_loopback(self.there)

    def check(self, keys: list[str], /) -> bool:
        return self._open().check(keys)

    def get(self, key: str, /) -> bytes:
        return self._open().get(key)

    def set(self, key: str, value: str, /) -> None:
        store = self._open()
        store.set(key, value)
        self._mine[key] = value
        if store.is_signed and self._keeper is None:
            self._keeper = threading.Thread(
                target=self._keep, name="packcast-rendezvous", daemon=True
            )
            self._keeper.start()

    def announce(self, rank: int) -> None:
        self._open().announce(rank)

    def is_announced(self, rank: int) -> bool:
        return self._open().is_announced(rank)

    def _keep(self) -> None:
        while not self._over.wait(_SLOWEST_POLL_S):
            with contextlib.suppress(RuntimeError, PackcastError):  # the store has gone
                for key, value in list(self._mine.items()):
                    if self._open().is_foreign(key) or not self._open().check([key]):
                        self._open().set(key, value)

    def hosts_of(self, sender: SenderAddress) -> list[str]:
        """The addresses at which this rank may reach the sender, the likeliest first."""
        interface = None if self.here is None else interface_of(self.here)
        told = [with_interface(host, interface) for host in sender.hosts]
        if sender.beside_store:
            told.insert(0, self.there or "127.0.0.1")
        return list(dict.fromkeys(told))

    def close(self, wait_s: float = 0.0) -> None:
        """Let go of the store: on the rank that hosts it the port is free from now on.

        Elsewhere wait for that, at most `wait_s`. Nobody needs to where all ranks are told to go on
        only once rank 0 has closed.
        """
        self._over.set()
        if self._keeper is not None:
            self._keeper.join(GRACE_S)
        self._store = None
        link, self._link = self._link, None
        if link is None:
            return
        with link, contextlib.suppress(OSError):
            if wait_s > 0 and not self._outlives_this():
                link.settimeout(wait_s)
                link.recv(1)  # nothing ever comes but the end

    def _outlives_this(self) -> bool:
        """Whether the store is torchrun's agent's, or perhaps the default group's."""
        import torch.distributed as dist

        return self.is_agents or dist.is_initialized()

    def _open(self) -> SignedKeys:
        if self._store is None:
            raise RuntimeError("the rendezvous is over")
        return self._store


def open_rendezvous(
    launch: Launch,
    environ: Mapping[str, str],
    timeout_s: float,
    port: int | None = None,
    *,
    secret: bytes | None = None,
    call: int = 0,
    log: Callable[[str], object] = lambda _text: None,
) -> Rendezvous:
    """Every rank of a launch calls this first; what they say there is signed with the `secret`.

    Does not wait for the other ranks, only (up to `timeout_s`) for the store's host: `log` is told
    where that takes long. `port` goes before the one derived from the job; `call` counts the
    transfers of this launch, each of which has keys of its own. Raises RendezvousError where the
    port is in use or the host does not answer.
    """
    address = rendezvous_address(launch, environ, port)
    context = launch_context(launch, environ, call)

    def signed(store: Store) -> SignedKeys:
        return SignedKeys(_of_this_call(store, environ, call), secret, context)

    if launch.kind == "torchrun" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _joined(launch, address, timeout_s, signed, log, agents=True)
    if launch.is_one_host and not (is_literal(address[0]) and is_loopback(address[0])):
        address = (LOOPBACK, address[1])
    if launch.rank:
        return _joined(launch, address, timeout_s, signed, log)
    import torch.distributed as dist

    option = "--master-port (MASTER_PORT)" if launch.kind == "torchrun" else "--port"
    on = _address_here(address[0])
    try:
        # Its own way there: its name may not be known yet, or be another host's.
        store, _ = host_store(on, on or LOOPBACK, address[1], timeout_s, option=option)
    except RendezvousError:
        if not dist.is_initialized():
            raise
        # The port is most likely taken by the default group's own store, which serves as well.
        return _joined(launch, address, timeout_s, signed, log)
    return Rendezvous(signed(store), address, None)


def _address_here(host: str) -> str:
    """This host's address by that name; "", every one, where it is not certain that others reach
    it: many systems give a host's own name a loopback address."""
    if is_literal(host):
        return host if source_towards(host) == host else ""
    try:
        found = {text_of(address) for *_, address in resolve(host, 0)}
    except OSError:
        return ""
    here = [each for each in found if not is_loopback(each) and source_towards(each) == each]
    return here[0] if len(here) == 1 else ""


def _joined(
    launch: Launch,
    address: tuple[str, int],
    timeout_s: float,
    signed: Callable[[Store], SignedKeys],
    log: Callable[[str], object],
    *,
    agents: bool = False,
) -> Rendezvous:
    deadline = time.monotonic() + timeout_s
    link = await_listener(*address, deadline, log)
    try:
        left_s = max(deadline - time.monotonic(), GRACE_S)
        store = (
            _agents_store(launch, address, left_s) if agents else connect_store(*address, left_s)
        )
        return Rendezvous(signed(store), address, link, is_agents=agents)
    except BaseException:
        link.close()
        raise


def settle_sender(
    store: Keys, launch: Launch, role: Literal["send", "recv"], timeout_s: float
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

    def post_and_settle() -> int:
        if isinstance(store, Rendezvous):
            store.announce(launch.rank)
        store.set(_role_key(launch.rank), role)
        return _poll(store, settled, lambda: _missing(store, launch, timeout_s), timeout_s)

    return answer_in(timeout_s, _NO_ANSWER, post_and_settle)


def _missing(store: Keys, launch: Launch, timeout_s: float) -> str:
    """Who has not come, where the time to join is over."""
    missing = [rank for rank in range(launch.world_size) if not store.check([_role_key(rank)])]
    named = ", ".join(map(str, missing[:_MAX_NAMED_RANKS]))
    more = len(missing) - _MAX_NAMED_RANKS
    verb = "has" if len(missing) == 1 else "have"
    is_foreign = isinstance(store, Rendezvous) and any(map(store.is_announced, missing))
    return (
        f"{'rank' if len(missing) == 1 else 'ranks'} {named}"
        f"{f' and {more} more' if more > 0 else ''} {verb} not joined"
        f" within {format_duration(timeout_s)}"
        f"{', or not with the same token as this rank' if is_foreign else ''}"
    )


def post_route(rendezvous: Rendezvous, launch: Launch) -> None:
    """Every rank but where all are on one host: by which address it has reached the store."""
    way = rendezvous.there or LOOPBACK
    answer_in(GRACE_S, _NO_ANSWER, lambda: rendezvous.set(_route_key(launch.rank), way))


def await_routes(store: Keys, launch: Launch, timeout_s: float) -> set[str]:
    """By which addresses the ranks have reached the store, once all have come."""

    def ways() -> set[str] | None:
        keys = [_route_key(rank) for rank in range(launch.world_size)]
        if not store.check(keys):
            return None
        return {store.get(key).decode(errors="replace") for key in keys}

    return answer_in(
        timeout_s,
        _NO_ANSWER,
        lambda: _poll(store, ways, lambda: _missing(store, launch, timeout_s), timeout_s),
    )


def publish_address(store: Keys, address: SenderAddress) -> None:
    """The sender says where its control channel listens."""
    text = json.dumps(
        {"hosts": address.hosts, "port": address.port, "beside_store": address.beside_store}
    )
    answer_in(GRACE_S, _NO_ANSWER, lambda: store.set(_ADDRESS_KEY, text))


def publish_failure(store: Keys, error: PackcastError) -> None:
    """Tell the ranks that still wait in `settle_sender` or `await_address`; never raises."""
    text = json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint})
    try:
        answer_in(GRACE_S, "no answer", lambda: store.set(_FAILURE_KEY, text))
    except (PackcastError, RuntimeError):
        return  # the launcher ends the others, or their own deadline does


def leave_failed_join(rendezvous: Rendezvous, launch: Launch, limit_s: float) -> None:
    """The way out of a join that failed; every rank calls this, which closes the rendezvous.

    Where rank 0 hosts the store it stays until the others have read why, but no longer than
    `limit_s`: without the store they could only time out. And they stay until it has gone, so that
    all leave the port as they found it. Never raises.
    """
    others = [f"gone/{rank}" for rank in range(1, launch.world_size)]

    def go() -> None:
        if launch.rank:
            rendezvous.set(f"gone/{launch.rank}", "")
            return
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not all(rendezvous.check([key]) for key in others):
            time.sleep(_SLOWEST_POLL_S / 4)

    if not rendezvous.is_agents:
        with contextlib.suppress(PackcastError, RuntimeError):
            answer_in(limit_s, "no answer", go)
    rendezvous.close(GRACE_S)


def await_address(store: Keys, timeout_s: float) -> SenderAddress:
    """Where the control channel listens, for every rank but the sender.

    Raises the sender's own error where it failed first, RendezvousError at the deadline.
    """

    def published() -> SenderAddress | None:
        if not store.check([_ADDRESS_KEY]):
            return None
        try:
            told = json.loads(store.get(_ADDRESS_KEY))
            hosts = tuple(map(str, told["hosts"]))
            return SenderAddress(hosts, int(told["port"]), told["beside_store"] is True)
        except (ValueError, KeyError, TypeError):
            return None  # without a token anybody may have set it

    def silence() -> str:
        return f"the sender published no address within {format_duration(timeout_s)}"

    return answer_in(
        timeout_s,
        _NO_ANSWER,
        lambda: _poll(store, published, silence, timeout_s),
    )


_ADDRESS_KEY = "address"
_FAILURE_KEY = "failure"


def _route_key(rank: int) -> str:
    return f"way/{rank}"


def _role_key(rank: int) -> str:
    return f"role/{rank}"


def _of_this_call(store: Store, environ: Mapping[str, str], call: int) -> Store:
    """Keys of our own: an agent's store outlives restarts of its workers, old addresses in it."""
    from torch._C._distributed_c10d import PrefixStore

    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"packcast/{restart}/{call}", store)


def _agents_store(launch: Launch, address: tuple[str, int], timeout_s: float) -> Store:
    """torchrun's own store, by way of torch's rendezvous, which knows the agent's habits."""
    from torch.distributed.rendezvous import rendezvous

    def meet() -> Store:
        pair = rendezvous(
            "env://", launch.rank, launch.world_size, timeout=timedelta(seconds=timeout_s)
        )
        store: Store = next(iter(pair))[0]
        return store

    host, port = address
    return answer_in(
        timeout_s,
        f"the launcher's store at {host_and_port(host, port)} does not answer",
        meet,
    )


def _poll(
    store: Keys, found: Callable[[], T | None], silence: Callable[[], str], timeout_s: float
) -> T:
    """`found()` once it is not None; another rank's failure or `silence()` as an error else."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.005
    while True:
        if store.check([_FAILURE_KEY]) and (failure := _failure(store)) is not None:
            raise failure
        value = found()
        if value is not None:
            return value
        if time.monotonic() > deadline:
            raise RendezvousError(silence())
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _SLOWEST_POLL_S)


def _failure(store: Keys) -> PackcastError | None:
    try:
        told = json.loads(store.get(_FAILURE_KEY))
        return error_from_code(int(told["code"]), str(told["message"]), told["hint"])
    except (ValueError, KeyError, TypeError):
        return None  # as above
