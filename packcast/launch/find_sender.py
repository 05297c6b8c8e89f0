"""How the ranks of a launch find the sender, before there is a control channel.

Roles and one address go through the store, never bulk data. Keys are polled rather than waited
for: a store's own time-outs cannot be relied on (see store.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from packcast.control.addresses import interface_of, with_interface
from packcast.control.membership import listed
from packcast.control.messages import Abort
from packcast.errors import PackcastError, RendezvousError
from packcast.launch.handover import LOOPBACK
from packcast.launch.launchers import Launch
from packcast.launch.rendezvous import Rendezvous
from packcast.launch.secret import Keys
from packcast.launch.store import GRACE_S, answer_in
from packcast.units import format_duration

T = TypeVar("T")

_SLOWEST_POLL_S = 0.2
_NO_ANSWER = "the launcher's store does not answer"
_FOREIGN_AFTER_S = 2.0  # a rank sets its role at once
_TOKEN = "set the same PACKCAST_TOKEN on all hosts"
_ADDRESS_KEY = "address"
_FAILURE_KEY = "failure"


def _role_key(rank: int) -> str:
    return f"role/{rank}"


def _route_key(rank: int) -> str:
    return f"route/{rank}"


@dataclass(frozen=True, slots=True)
class SenderAddress:
    """Where the sender's control channel listens: at one of `hosts`, the likeliest first.

    `beside_store`: also on the host of the launcher's store, at the address by which each rank
    has reached that.
    """

    hosts: tuple[str, ...]
    port: int
    beside_store: bool = False


_SENDER_ADDRESS = TypeAdapter(SenderAddress)


def hosts_of(address: SenderAddress, rendezvous: Rendezvous) -> list[str]:
    """The addresses at which this rank may reach the sender, the likeliest first."""
    interface = None if rendezvous.here is None else interface_of(rendezvous.here)
    hosts = [with_interface(host, interface) for host in address.hosts]
    if address.beside_store:
        hosts.insert(0, rendezvous.there or LOOPBACK)
    return list(dict.fromkeys(hosts))


def settle_sender(
    store: Keys,
    launch: Launch,
    role: Literal["send", "recv"],
    timeout_s: float,
    log: Callable[[str], object] = lambda _text: None,
) -> int:
    """The lowest rank that ran `send`; every rank calls this with its own role.

    Returns as soon as that is certain: ranks above the sender need not have come. Raises
    RendezvousError if no rank sends, or naming those still missing at the deadline; or the
    failure that another rank published. `log` gets a line if one seems to have another token.
    """
    foreign = _Foreign(store, log)

    def lowest_sender() -> int | None:
        for rank in range(launch.world_size):
            if not store.check([_role_key(rank)]):
                foreign.note(rank)
                return None
            if store.get(_role_key(rank)) == b"send":
                return rank
        raise RendezvousError(
            "no rank ran `packcast send`",
            hint="one launch must run `packcast send CKPT`, the others `packcast recv`",
        )

    def post_role() -> None:
        if isinstance(store, Rendezvous):
            store.announce(launch.rank)
        store.set(_role_key(launch.rank), role)

    answer_in(timeout_s, _NO_ANSWER, post_role)
    return _poll(store, lowest_sender, lambda: _missing(store, launch, timeout_s), timeout_s)


class _Foreign:
    """Notes, once, a rank that has come although its role is not there: signed with another token.

    Anybody can pretend that of a rank, so the others go on waiting.
    """

    def __init__(self, store: Keys, log: Callable[[str], object]) -> None:
        self._store = store
        self._log = log
        self._since: dict[int, float] = {}
        self._has_noted = False

    def note(self, rank: int) -> None:
        if self._has_noted or not _is_announced(self._store, rank):
            return
        now = time.monotonic()
        if now - self._since.setdefault(rank, now) > _FOREIGN_AFTER_S:
            self._has_noted = True
            self._log(f"rank {rank} is there, but not with the same token as this rank: {_TOKEN}")


def _is_announced(store: Keys, rank: int) -> bool:
    return isinstance(store, Rendezvous) and store.is_announced(rank)


def _missing(store: Keys, launch: Launch, timeout_s: float) -> RendezvousError:
    """The error that names the ranks which have not joined in time."""
    missing = [rank for rank in range(launch.world_size) if not store.check([_role_key(rank)])]
    is_foreign = any(_is_announced(store, rank) for rank in missing)
    return RendezvousError(
        f"{'rank' if len(missing) == 1 else 'ranks'} {listed([str(rank) for rank in missing])}"
        f" {'has' if len(missing) == 1 else 'have'} not joined within {format_duration(timeout_s)}"
        f"{', or not with the same token as this rank' if is_foreign else ''}",
        hint=_TOKEN if is_foreign else "start the missing ones, or give a longer --join-timeout",
    )


def post_route(rendezvous: Rendezvous, launch: Launch) -> None:
    """Publish by which address this rank has reached the store; not if all are on one host."""
    route = rendezvous.there or LOOPBACK
    answer_in(GRACE_S, _NO_ANSWER, lambda: rendezvous.set(_route_key(launch.rank), route))


def await_routes(
    store: Keys, launch: Launch, timeout_s: float, log: Callable[[str], object]
) -> set[str]:
    """By which addresses the ranks have reached the store, once all have come; `log` as above."""
    keys = [_route_key(rank) for rank in range(launch.world_size)]
    foreign = _Foreign(store, log)

    def routes() -> set[str] | None:
        # One by one: the last may come between a look at all and a search for the missing one.
        missing = next((rank for rank, key in enumerate(keys) if not store.check([key])), None)
        if missing is not None:
            foreign.note(missing)
            return None
        return {store.get(key).decode(errors="replace") for key in keys}

    return _poll(store, routes, lambda: _missing(store, launch, timeout_s), timeout_s)


def publish_address(store: Keys, address: SenderAddress) -> None:
    """The sender publishes where its control channel listens."""
    text = _SENDER_ADDRESS.dump_json(address).decode()
    answer_in(GRACE_S, _NO_ANSWER, lambda: store.set(_ADDRESS_KEY, text))


def await_address(store: Keys, timeout_s: float) -> SenderAddress:
    """Where the control channel listens, for every rank but the sender.

    Raises the sender's own error if it failed first, RendezvousError at the deadline.
    """

    def published() -> SenderAddress | None:
        if store.check([_ADDRESS_KEY]):
            with contextlib.suppress(ValidationError):  # without a token anybody may have set it
                return _SENDER_ADDRESS.validate_json(store.get(_ADDRESS_KEY))
        return None

    def silence() -> RendezvousError:
        return RendezvousError(
            f"the sender published no address within {format_duration(timeout_s)}",
            hint="its own output says what it waits for",
        )

    return _poll(store, published, silence, timeout_s)


def publish_failure(store: Keys, error: PackcastError) -> None:
    """Notify the ranks that still wait in `settle_sender` or `await_address`; never raises."""
    text = Abort.of(error).model_dump_json()
    # If that fails, the launcher ends the others, or their own deadline does.
    with contextlib.suppress(PackcastError, RuntimeError):
        answer_in(GRACE_S, "no answer", lambda: store.set(_FAILURE_KEY, text))


def _failure(store: Keys) -> PackcastError | None:
    if store.check([_FAILURE_KEY]):
        with contextlib.suppress(ValidationError):  # without a token anybody may have set it
            return Abort.model_validate_json(store.get(_FAILURE_KEY)).error()
    return None


def _poll(
    store: Keys,
    look: Callable[[], T | None],
    silence: Callable[[], RendezvousError],
    timeout_s: float,
) -> T:
    """`look()` once it is not None; raises another rank's failure, or `silence()` in the end."""

    def poll() -> T:
        deadline = time.monotonic() + timeout_s
        pause_s = 0.005
        while True:
            if (failure := _failure(store)) is not None:
                raise failure
            if (value := look()) is not None:
                return value
            if time.monotonic() > deadline:
                raise silence()
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _SLOWEST_POLL_S)

    return answer_in(timeout_s, _NO_ANSWER, poll)


def leave_failed_join(rendezvous: Rendezvous, launch: Launch, limit_s: float) -> None:
    """After a failed join; every rank calls this, which closes the rendezvous. Never raises.

    A rank 0 that hosts the store waits until the others have read the failure, but no longer than
    `limit_s`: without the store they could only time out. The others wait until it has closed, so
    that the port is free when they exit.
    """
    others = [f"gone/{rank}" for rank in range(1, launch.world_size)]

    def meet() -> None:
        if launch.rank:
            rendezvous.set(f"gone/{launch.rank}", "")
            return
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not all(rendezvous.check([key]) for key in others):
            time.sleep(_SLOWEST_POLL_S / 4)

    if not rendezvous.is_agents:
        with contextlib.suppress(PackcastError, RuntimeError):
            answer_in(limit_s, "no answer", meet)
    rendezvous.close(GRACE_S)
