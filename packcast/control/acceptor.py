"""Accepts connections on the server's loop, and passes on those that have proved the token.

Bytes, time, and connections, in all and from one address, are bounded. If there are too many, the
oldest one without a proof is closed for a new one, so silent ones block no worker; a worker whose
connection was closed so tries again.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address

from packcast.control import auth
from packcast.control.addresses import host_and_port, listening_socket, text_of
from packcast.control.clock import AwakeClock
from packcast.control.connection import Connection, tune
from packcast.control.frames import (
    ACCEPTED,
    CHALLENGE,
    PROTOCOL,
    REJECTED,
    FrameReader,
    frame_of,
)
from packcast.control.messages import Abort, Hello, decode
from packcast.errors import PackcastError, RendezvousError

HANDSHAKE_LIMIT_S = 10.0
REFUSED_LINGER_S = 2.0
PAUSE_S = 0.5
MAX_VISITORS = 2048
MAX_VISITORS_OF_NETWORK = 512  # more than there are ranks on a host
LOG_INTERVAL_S = 60.0

_BACKLOG = 4096
_ACCEPTS_PER_TURN = 64


def listen(host: str, port: int | range) -> socket.socket:
    """A listening socket that never blocks; "" is every address, 0 any free port.

    Raises RendezvousError if the address cannot be used.
    """
    try:
        listener = listening_socket(host, port)
    except OSError as error:
        raise RendezvousError(
            f"cannot listen on {host_and_port(host or '*', port)}: {error.strerror or error}",
            hint="choose another port, or another address of this host",
        ) from error
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def raise_descriptor_limit() -> None:
    """To the hard limit: there is one socket for each worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(slots=True, eq=False)
class _Visitor:
    """A connection that is not a worker's yet, or was refused."""

    connection: Connection
    network: str
    until: float
    challenge: auth.Challenge | None = None
    can_be_evicted: bool = True
    is_refused: bool = False


class Acceptor:
    """Accepts connections until `close`. `without_token` is the last who had another or none;
    `was_reached`: something has connected.

    `on_hello(connection, hello)` gets each worker with the right token: the server serves it, or
    answers with `refuse`. `on_mismatch(error)` gets the error for one with another protocol.
    """

    def __init__(
        self,
        listener: socket.socket,
        loop: asyncio.AbstractEventLoop,
        clock: AwakeClock,
        *,
        transfer_id: str,
        token: bytes | None,
        log: Callable[[str], None],
        on_hello: Callable[[Connection, Hello], None],
        on_mismatch: Callable[[RendezvousError], None],
    ) -> None:
        self._listener = listener
        self._loop = loop
        self._clock = clock
        self._transfer_id = transfer_id
        self._token = token
        self._log = log
        self._on_hello = on_hello
        self._on_mismatch = on_mismatch
        # By network, in order of arrival: the first of one is the next to go.
        self._visitors: dict[str, dict[_Visitor, None]] = {}
        self._num_visitors = 0
        self._num_strangers = 0
        self.without_token: str | None = None
        self.was_reached = False
        self._quiet_until = 0.0
        loop.add_reader(listener, self._accept)

    def refuse(self, connection: Connection, error: PackcastError) -> None:
        """Send the reason, and close once the worker has read it."""
        connection.send(Abort.of(error).encode())
        self._linger(connection)

    def tick(self, now: float) -> None:
        """Close connections that take too long."""
        everybody = [visitor for group in self._visitors.values() for visitor in group]
        for visitor in [visitor for visitor in everybody if now >= visitor.until]:
            self._forget(visitor, f"no proof within {HANDSHAKE_LIMIT_S:g} s")

    def close(self) -> None:
        """Stop accepting; close all connections that are not workers'."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for visitor in [visitor for group in self._visitors.values() for visitor in group]:
            visitor.connection.close()
        self._visitors.clear()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # gone already
            except OSError as error:
                # Out of descriptors: wait, the kernel keeps the others.
                self._log(f"a connection could not be accepted: {error.strerror}")
                self._loop.remove_reader(self._listener)
                self._loop.call_later(PAUSE_S, self._accept_again)
                return
            self.was_reached = True
            try:
                if _has_left(sock):
                    sock.close()
                    continue
                tune(sock)
                self._greet(sock, text_of(address), text_of(sock.getsockname()))
            except OSError:
                sock.close()

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _greet(self, sock: socket.socket, address: str, local_address: str) -> None:
        connection = Connection(
            sock, FrameReader(auth.FROM_STRANGER), self._loop, self._clock, address, local_address
        )
        challenge = auth.Challenge.new(self._transfer_id, wants_token=self._token is not None)
        until = connection.heard + HANDSHAKE_LIMIT_S
        visitor = _Visitor(connection, _network_of(address), until, challenge)
        connection.on_frame = partial(self._on_proof, visitor)
        connection.on_end = partial(self._on_end, visitor)
        self._add(visitor)
        connection.send(frame_of(CHALLENGE, challenge.body))

    def _on_proof(self, visitor: _Visitor, connection: Connection, _: int, body: bytes) -> None:
        proof, challenge = auth.Proof.parse(body), visitor.challenge
        assert challenge is not None
        if not proof.is_right(self._token, challenge):
            connection.send(frame_of(REJECTED, b""))
            self._remove(visitor)
            self.without_token = connection.address
            self._note_stranger(connection, "its token is wrong")
            self._linger(connection)
            return
        connection.send(frame_of(ACCEPTED, proof.answer(self._token, challenge)))
        if proof.protocol != PROTOCOL:
            worker = f"the worker at {connection.address}"
            error = auth.protocols_differ(worker, proof.protocol, PROTOCOL)
            self._remove(visitor)
            self.refuse(connection, error)
            self._on_mismatch(error)
            return
        visitor.can_be_evicted = self._token is None  # without a token anybody has a valid proof
        connection.allow({Hello.kind: Hello.limit})
        connection.on_frame = partial(self._on_first_message, visitor)

    def _on_first_message(
        self, visitor: _Visitor, connection: Connection, kind: int, body: bytes
    ) -> None:
        hello = decode(kind, body)
        assert isinstance(hello, Hello), "nothing else is allowed"
        self._remove(visitor)
        self._on_hello(connection, hello)

    def _on_end(self, visitor: _Visitor, connection: Connection, why: str | None) -> None:
        if why is None and self._token is not None and not visitor.is_refused:
            self.without_token = connection.address
            why = "it left without a proof of the token; is PACKCAST_TOKEN set there?"
        self._forget(visitor, why or "it left without a proof")

    def _linger(self, connection: Connection) -> None:
        """The refused worker reads the reason and closes first; its bytes are dropped."""
        until = self._clock.read() + REFUSED_LINGER_S
        visitor = _Visitor(connection, _network_of(connection.address), until, is_refused=True)
        connection.allow({})
        connection.on_end = partial(self._on_end, visitor)
        self._add(visitor)

    def _add(self, visitor: _Visitor) -> None:
        group = self._visitors.setdefault(visitor.network, {})
        if len(group) >= MAX_VISITORS_OF_NETWORK:
            self._evict_from(group)
        elif self._num_visitors >= MAX_VISITORS:
            self._evict_from(max(self._visitors.values(), key=len))
        self._visitors.setdefault(visitor.network, {})[visitor] = None
        self._num_visitors += 1

    def _evict_from(self, group: dict[_Visitor, None]) -> None:
        oldest = next((visitor for visitor in group if visitor.can_be_evicted), None)
        if oldest is not None:
            self._forget(oldest, "it was silent while others came")

    def _remove(self, visitor: _Visitor) -> None:
        group = self._visitors.get(visitor.network, {})
        if visitor in group:
            del group[visitor]
            self._num_visitors -= 1
        if not group:
            self._visitors.pop(visitor.network, None)

    def _forget(self, visitor: _Visitor, why: str) -> None:
        self._remove(visitor)
        visitor.connection.close()
        if not visitor.is_refused:
            self._note_stranger(visitor.connection, why)

    def _note_stranger(self, connection: Connection, why: str) -> None:
        """Log the first one, then a count at intervals."""
        self._num_strangers += 1
        now = time.monotonic()
        if now < self._quiet_until:
            return
        self._quiet_until = now + LOG_INTERVAL_S
        so_far = f" ({self._num_strangers} so far)" if self._num_strangers > 1 else ""
        self._log(f"dropped {connection.label}: {why}{so_far}")


def _has_left(sock: socket.socket) -> bool:
    """It came before the control thread, and tries again: it is no stranger."""
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def _network_of(address: str) -> str:
    """The unit of the limit: an IPv4 address, or the /64 network of an IPv6 address."""
    ip = ip_address(address.partition("%")[0])
    return address if ip.version == 4 else str(IPv6Address(int(ip) >> 64 << 64))
