"""The store of a launch: the launcher's own, or one that rank 0 hosts until all have joined."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from packcast.control.addresses import (
    LOOK_UP_LIMIT_S,
    host_and_port,
    is_literal,
    is_loopback,
    resolve,
    source_towards,
    text_of,
)
from packcast.errors import PackcastError, RendezvousError
from packcast.launch.handover import LOOPBACK
from packcast.launch.launchers import Launch, rendezvous_address
from packcast.launch.secret import SignedKeys, launch_context
from packcast.launch.store import GRACE_S, answer_in, await_listener, connect_store, host_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_SLOWEST_POLL_S = 0.2
_MAX_NAMED_RANKS = 8
_NO_ANSWER = "the launcher's store does not answer"


class Rendezvous:
    """The launcher's store while the ranks find each other, from `open_rendezvous` until `close`.

    Either the launcher's own, or one that rank 0 hosts at the launcher's address until then: a
    trainer's init_process_group needs that port afterwards. Callers hold this object, not the
    store in it, since the frames of an exception would keep the port in use.

    With signed keys, this rank sets its own keys again if a stranger has changed them.
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

    def close(self, wait_s: float = 0.0) -> None:
        """Release the store: the port is free from now on, on the rank that hosts it.

        Other ranks wait for that, at most `wait_s`; 0 if all go on only after rank 0 has closed.
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
        """Whether it belongs to torchrun's agent, or perhaps to the default group."""
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
    """Every rank of a launch calls this first; the keys are signed with the `secret`.

    Waits only for the store's host (up to `timeout_s`; `log` gets a line if that takes long), not
    for other ranks. `port` replaces the one derived from the job; `call` counts the transfers of
    this launch, each of which has its own keys. Raises RendezvousError if the port is in use or
    the host does not answer.
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
    # The others look for this store meanwhile.
    on = _address_here(address[0], min(timeout_s / 2, LOOK_UP_LIMIT_S))
    try:
        # Its own way there: its name may not be known yet, or be another host's.
        store, _ = host_store(on, on or LOOPBACK, address[1], timeout_s, option=option)
    except RendezvousError:
        if not dist.is_initialized():
            raise
        # The port is most likely taken by the default group's own store, which serves as well.
        return _joined(launch, address, timeout_s, signed, log)
    return Rendezvous(signed(store), address, None)


def _address_here(host: str, limit_s: float) -> str:
    """This host's address by that name, or "", every address, if others may not reach that.

    Many systems resolve a host's own name to a loopback address, and a name server may be dead.
    """
    if is_literal(host):
        return host if source_towards(host) == host else ""
    try:
        addresses = {text_of(address) for *_, address in resolve(host, 0, limit_s=limit_s)}
    except OSError:
        return ""
    here = [each for each in addresses if not is_loopback(each) and source_towards(each) == each]
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


def _of_this_call(store: Store, environ: Mapping[str, str], call: int) -> Store:
    """Keys of our own: an agent's store outlives restarts of its workers, old addresses in it."""
    from torch._C._distributed_c10d import PrefixStore

    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"packcast/{restart}/{call}", store)


def _agents_store(launch: Launch, address: tuple[str, int], timeout_s: float) -> Store:
    """torchrun's own store, opened by torch's rendezvous as the agent expects it."""
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
