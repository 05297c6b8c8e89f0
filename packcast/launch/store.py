"""Stores of torch, hosted or joined. torch is imported when one is opened.

A TCPStore ignores its own time-outs while its host is frozen, and prints thirty lines of C++ stack
for a broken connection. So plain sockets test ports first, and calls that can block run on their
own threads.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from packcast.control.addresses import (
    NAME_HINT,
    NO_NAME_SERVER,
    REACH_LIMIT_S,
    connect,
    host_and_port,
    listening_socket,
    says_loopback,
)
from packcast.control.time_limit import within
from packcast.errors import RendezvousError, first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_TRY_LIMIT_S = 5.0
GRACE_S = 5.0  # a store call so long after its own deadline is stuck


def serve_store(host: str, timeout_s: float, ports: range | None = None) -> tuple[Store, int]:
    """Host a store on a free port of `host`'s interface only; returns it and the port.

    A store has no authentication, hence one interface. Its host must be the last to leave.
    """
    return host_store(host, host, ports or 0, timeout_s, option="--port-range")


def join_served_store(host: str, port: int, timeout_s: float) -> Store:
    """A client of the sender's store, which listens already.

    So RendezvousError is raised soon if nothing answers.
    """
    try:
        await_listener(host, port, time.monotonic() + REACH_LIMIT_S).close()
    except RendezvousError as error:
        raise RendezvousError(
            f"{error.message}, after {REACH_LIMIT_S:g} s; the sender listens there, and its"
            " control port was reached",
            hint="does a firewall block that port? --port-range chooses ports that may pass",
        ) from None
    return connect_store(host, port, timeout_s)


def connect_store(host: str, port: int, timeout_s: float) -> Store:
    """A client of the store at `host:port`, once something listens there."""
    from torch._C._distributed_c10d import TCPStore

    deadline = time.monotonic() + timeout_s
    await_listener(host, port, deadline).close()
    return answer_in(
        max(deadline - time.monotonic(), GRACE_S),
        f"the store at {host_and_port(host, port)} does not answer",
        lambda: TCPStore(
            host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False
        ),
    )


def host_store(
    on: str, host: str, port: int | range, timeout_s: float, *, option: str
) -> tuple[Store, int]:
    """Host a store on the addresses of `on`; this process is its first client, through `host`.

    The socket is bound here, for a clear error if the port is in use: `option` chooses another.
    Returns the store and its port.
    """
    from torch._C._distributed_c10d import TCPStore

    try:
        listener = listening_socket(on, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise RendezvousError(
            f"cannot serve the store at {host_and_port(host, port)}: "
            f"{_taken(port) if taken else error.strerror or error}",
            hint=f"choose another port with {option}" if taken and option else None,
        ) from None
    port = int(listener.getsockname()[1])
    store = answer_in(
        timeout_s,
        f"cannot reach my own store at {host_and_port(host, port)}",
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


def await_listener(
    host: str, port: int, deadline: float, log: Callable[[str], object] | None = None
) -> socket.socket:
    """A connection to `host:port`, once it listens; the name may not resolve yet.

    `log` gets a line if that takes long. Raises RendezvousError at the deadline.
    """
    where = host_and_port(host, port)
    pause_s = 0.02
    log_at = time.monotonic() + _TRY_LIMIT_S - 1.0

    def say(reason: str) -> None:
        nonlocal log
        if log is not None and time.monotonic() > log_at:
            log(f"waiting for the launcher's store at {where} ({reason[0].lower()}{reason[1:]})")
            log = None

    while True:
        left_s = max(deadline - time.monotonic(), 0.1)
        limit_s = min(left_s, _TRY_LIMIT_S) if log else left_s
        hint = _only_here(host)
        try:
            return connect(host, port, limit_s, look_up_s=left_s, check=lambda: say(NO_NAME_SERVER))
        except TimeoutError:
            reason = "no answer: the host is down, or a firewall blocks that port"
        except socket.gaierror as error:
            reason = f"its name cannot be resolved: {(error.strerror or str(error)).lower()}"
            hint = hint or NAME_HINT
        except OSError as error:
            reason = error.strerror or str(error)
        say(reason)
        if time.monotonic() + pause_s > deadline:
            raise RendezvousError(f"cannot reach the store at {where}: {reason}", hint=hint)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def _taken(port: int | range) -> str:
    return "all ports are in use" if isinstance(port, range) else "the port is in use"


def _only_here(host: str) -> str | None:
    if says_loopback(host):
        return f"{host} is this host itself: ranks of other hosts need an address they reach"
    return None


def answer_in(limit_s: float, complaint: str, call: Callable[[], T]) -> T:
    """The result of `call`; RendezvousError if it is stuck GRACE_S after the limit.

    The stuck thread stays behind with the store's lock, so the process can only exit.
    """
    try:
        result = within(limit_s + GRACE_S, "packcast-store", call)
    except RuntimeError as error:  # torch's DistError and its kin
        raise RendezvousError(f"{complaint}: {first_line(error)}") from None
    if result is None:
        raise RendezvousError(complaint)
    return result[0]
