"""Where the sender listens, by the names and routes that the other ranks have for this host."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from packcast.control.addresses import (
    LOOK_UP_LIMIT_S,
    addresses_here,
    host_and_port,
    is_everywhere,
    is_literal,
    is_loopback,
    resolve,
    says_loopback,
    source_towards,
    text_of,
)
from packcast.errors import RendezvousError
from packcast.launch.find_sender import await_routes
from packcast.launch.handover import LOOPBACK
from packcast.launch.launchers import Launch
from packcast.launch.rendezvous import Rendezvous
from packcast.view import View

_RESOLVE_AGAIN_S = 1.0


def host_in_launch(
    rendezvous: Rendezvous, launch: Launch, timeout_s: float, log: Callable[[str], None]
) -> str:
    """The address of this host at which the ranks of a launch reach it; "", every one, for several.

    The others have reached the launcher's store. If that is on another host, this host's source
    address on the way there will do. If it is here, the address by which they reached it counts: an
    address is the same on every host, but a name can resolve to another address on its own host,
    even to loopback.
    """
    if launch.is_one_host:
        return LOOPBACK
    if not rendezvous.is_here and rendezvous.here is not None:
        return rendezvous.here
    host = rendezvous.host
    if is_literal(host) and source_towards(host) == host:
        return host
    routes = await_routes(rendezvous, launch, timeout_s, log)
    others = [route for route in routes if is_literal(route) and not is_loopback(route)]
    here = [route for route in others if source_towards(route) == route]
    if len(here) > 1:
        hosts = ", ".join(sorted(here))
        log(f"ranks reach this host at {hosts}: listening on all addresses")
    if not others:
        return LOOPBACK
    return here[0] if len(here) == 1 else ""


def address_for_others(host: str, limit_s: float, view: View) -> str:
    """The address to listen on if the workers call this host `host`; "" is every address.

    The name may not resolve yet. And many systems resolve a host's own name to a loopback address
    (127.0.1.1 in /etc/hosts), which other hosts cannot reach: then it is every address.
    """
    if is_everywhere(host) or is_literal(host) or says_loopback(host):
        return host
    deadline = time.monotonic() + limit_s
    waiting = False
    while True:
        left_s = max(deadline - time.monotonic(), 0.1)
        try:
            found = resolve(host, 0, limit_s=min(left_s, LOOK_UP_LIMIT_S))
            addresses = [text_of(address) for *_, address in found]
            break
        except OSError as error:
            if time.monotonic() + _RESOLVE_AGAIN_S > deadline:
                raise RendezvousError(
                    f"cannot listen on {host}: {error.strerror}",
                    hint="--listen takes a name or an address of this host",
                ) from error
            if not waiting:
                view.note(f"waiting until {host} resolves to an address ({error.strerror})")
        waiting = True
        time.sleep(_RESOLVE_AGAIN_S)
    if not all(map(is_loopback, addresses)) or not addresses_here():
        return host
    view.note(
        f"{host} resolves to {addresses[0]} here, which other hosts cannot reach:"
        " listening on all addresses"
    )
    return ""


def hosts_to_reach(listening: str) -> list[str]:
    """The addresses by which other ranks reach a listener, the likeliest first."""
    if not is_everywhere(listening):
        return [listening]
    families = (4, 6) if listening == "::" else (4,)
    here = [host for host in addresses_here() if (6 if ":" in host else 4) in families]
    return here or ["127.0.0.1"]


def recv_line(host: str, port: int, token: str | None, token_file: Path | None) -> str:
    """The line to run on a worker."""
    line = f"packcast recv {shlex.quote(host_and_port(host, port))} --out DIR"
    if token_file is not None:
        line += f" --token-file {shlex.quote(str(token_file))}"
    return f"PACKCAST_TOKEN={shlex.quote(token)} {line}" if token else line
