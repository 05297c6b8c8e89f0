"""How a worker joins: connect to the sender, prove the token, receive WELCOME or the refusal.

Blocking calls with one deadline over all of them; the sender's input is checked as well.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packcast.control import auth
from packcast.control.addresses import (
    NAME_HINT,
    NO_NAME_SERVER,
    connect,
    host_and_port,
    says_loopback,
)
from packcast.control.connection import tune
from packcast.control.frames import (
    ACCEPTED,
    CHALLENGE,
    PROOF,
    PROTOCOL,
    REJECTED,
    FrameReader,
    ProtocolError,
    frame_of,
)
from packcast.control.messages import MAX_SECONDS, Abort, Hello, Welcome, decode
from packcast.control.rank_info import RankInfo
from packcast.errors import PackcastError, RendezvousError
from packcast.units import format_countdown, format_duration

RETRY_S = 0.2
LONGEST_RETRY_S = 1.0  # many workers wait for one sender
RESOLVE_AGAIN_S = 1.0
CONNECT_LIMIT_S = 5.0
LOOK_UP_PATIENCE_S = 3.0  # without a line about it
ANSWER_LIMIT_S = 10.0
MISMATCH_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Entered:
    """An open connection on which the sender has accepted this worker."""

    sock: socket.socket
    reader: FrameReader
    transfer_id: str
    welcome: Welcome
    me: RankInfo
    heartbeat_timeout_s: float


class _NotYet(Exception):
    """No sender there, for now."""

    def __init__(self, why: str, pause_s: float = RETRY_S) -> None:
        super().__init__(why)
        self.pause_s = pause_s


class _NoName(_NotYet):
    """The host's name cannot be resolved, for now."""


class _Stranger(RendezvousError):
    """Another program listens there."""


def enter(
    hosts: Sequence[str],
    port: int,
    *,
    me: RankInfo,
    token: bytes | None,
    join_timeout_s: float,
    heartbeat_timeout_s: float,
    log: Callable[[str], None],
    still_wanted: Callable[[], bool] = lambda: True,
) -> Entered:
    """Connect to the sender at one of the `hosts`, addresses or names, and be accepted.

    Tries again until the join timeout, since the worker may be first, the name may not resolve
    yet, or the sender may be busy; or until it is not `still_wanted`. Raises RendezvousError: no
    sender, a refusal, or another program at that address.
    """
    where = " or ".join(host_and_port(host, port) for host in hosts)
    hello = Hello(info=me, heartbeat_timeout_s=min(heartbeat_timeout_s, MAX_SECONDS))
    deadline = time.monotonic() + join_timeout_s
    slower = 1.0
    waiting = _Waiting(where, join_timeout_s, log, still_wanted)
    while True:
        whys = []
        for host in hosts:
            try:
                return _try(host, port, hello, token, deadline, waiting.look_up_hangs)
            except _NotYet as error:
                whys.append(error)
            except _Stranger:
                if len(hosts) == 1:
                    raise
                whys.append(_NotYet("another program is there"))
        why = ", ".join(dict.fromkeys(map(str, whys)))
        pause_s = min(LONGEST_RETRY_S, slower * max(error.pause_s for error in whys))
        slower *= 1.2
        waiting.check()
        if time.monotonic() + pause_s > deadline:
            raise RendezvousError(
                f"no sender at {where} within {format_duration(join_timeout_s)}: {why}",
                hint=_hint(hosts, whys),
            )
        waiting.say(why)
        time.sleep(pause_s * random.uniform(0.75, 1.0))


class _Waiting:
    """Says once what is waited for, and ends the wait if it is not wanted any more."""

    def __init__(
        self,
        where: str,
        limit_s: float,
        log: Callable[[str], None],
        still_wanted: Callable[[], bool],
    ) -> None:
        self._where = where
        self._limit = format_countdown(limit_s)
        self._log = log
        self._still_wanted = still_wanted
        self._has_said = False
        self._say_at = time.monotonic() + LOOK_UP_PATIENCE_S

    def check(self) -> None:
        if not self._still_wanted():
            raise RendezvousError(f"the sender at {self._where} is waited for no longer")

    def look_up_hangs(self) -> None:
        """Called again and again while a name is looked up."""
        self.check()
        if time.monotonic() > self._say_at:
            self.say(NO_NAME_SERVER)

    def say(self, why: str) -> None:
        if not self._has_said:
            where, limit = self._where, self._limit
            self._log(f"waiting for the sender at {where} ({why}); waits up to {limit}")
        self._has_said = True


def _hint(hosts: Sequence[str], whys: Sequence[_NotYet]) -> str:
    if all(map(says_loopback, hosts)):
        return f"{hosts[0]} is this host itself: a sender on another host has another address"
    if all(isinstance(why, _NoName) for why in whys):
        return NAME_HINT
    return "start `packcast send` there, or check the address and the firewall"


def _try(
    host: str,
    port: int,
    hello: Hello,
    token: bytes | None,
    deadline: float,
    check: Callable[[], None],
) -> Entered:
    sock = _connect(host, port, deadline, check)
    where = host_and_port(host, port)
    try:
        talk = _Exchange(sock, where, deadline)
        return talk.introduce(hello, talk.prove(token))
    except ProtocolError as error:
        sock.close()
        raise _Stranger(
            f"what listens at {where} is not a packcast sender of protocol {PROTOCOL}: {error}",
            hint="check the address and the port, and that all hosts have the same packcast",
        ) from error
    except OSError as error:
        sock.close()
        raise _NotYet((error.strerror or "the connection broke").lower()) from None
    except BaseException:
        sock.close()
        raise


def _connect(host: str, port: int, deadline: float, check: Callable[[], None]) -> socket.socket:
    left_s = max(0.1, deadline - time.monotonic())
    try:
        timeout_s = min(left_s, CONNECT_LIMIT_S)
        sock = connect(host, port, timeout_s, look_up_s=left_s, check=check)
        tune(sock)
    except socket.gaierror as error:
        # A service's name comes after its pods. Resolvers are shared, so they are asked less often.
        why = f"its name cannot be resolved: {(error.strerror or str(error)).lower()}"
        raise _NoName(why, min(RESOLVE_AGAIN_S, max(left_s / 4, RETRY_S))) from None
    except TimeoutError:
        raise _NotYet("no answer: the host is down, or a firewall blocks that port") from None
    except OSError as error:
        raise _NotYet((error.strerror or "no connection").lower()) from None
    return sock


class _Exchange:
    """The handshake on one connection."""

    def __init__(self, sock: socket.socket, where: str, deadline: float) -> None:
        self._sock = sock
        self._where = where
        self._deadline = deadline
        self._reader = FrameReader(auth.BEFORE_PROOF)

    def prove(self, token: bytes | None) -> auth.Challenge:
        """Both sides' proofs. Only frames of fixed size are read before the sender's."""
        kind, body = self._next_frame(ANSWER_LIMIT_S)
        if kind != CHALLENGE:
            raise ProtocolError("it does not begin with a challenge")
        challenge = auth.Challenge.parse(body)
        sender = f"the sender at {self._where}"
        if token is None and challenge.wants_token:
            raise _tokens_differ(f"{sender} asks for a token and this worker has none")
        if token is not None and not challenge.wants_token:
            raise _tokens_differ(f"this worker has a token and {sender} asks for none")
        proof = auth.Proof.new(token, challenge)
        self._send(frame_of(PROOF, proof.body))
        kind, body = self._next_frame(ANSWER_LIMIT_S)
        if kind == REJECTED:
            raise _tokens_differ("this worker's token is not the sender's")
        if kind != ACCEPTED:
            raise ProtocolError("it does not answer a proof")
        if not proof.is_answered(body, token, challenge):
            raise _tokens_differ(f"{sender} does not have this worker's token")
        return challenge

    def introduce(self, hello: Hello, challenge: auth.Challenge) -> Entered:
        """Send HELLO; returns if the sender accepts, else raises its reason."""
        self._reader.limits = {Welcome.kind: Welcome.limit, Abort.kind: Abort.limit}
        if challenge.protocol != PROTOCOL:
            raise self._mismatch(hello, challenge)
        self._send(hello.encode())
        kind, body = self._next_frame(self._deadline - time.monotonic())
        answer = decode(kind, body)
        if isinstance(answer, Abort):
            raise _refused(answer)
        assert isinstance(answer, Welcome), "nothing else is allowed"
        return Entered(
            self._sock,
            self._reader,
            challenge.transfer_id,
            answer,
            hello.info,
            hello.heartbeat_timeout_s,
        )

    def _mismatch(self, hello: Hello, challenge: auth.Challenge) -> PackcastError:
        """The sender's message about the two protocols, which all ranks print; else our own."""
        try:
            answer = decode(*self._next_frame(MISMATCH_LIMIT_S))
        except (_NotYet, OSError, ProtocolError):
            return auth.protocols_differ(hello.info.label, PROTOCOL, challenge.protocol)
        assert isinstance(answer, Abort), "nothing else is allowed"
        return _refused(answer)

    def _send(self, frame: bytes) -> None:
        self._sock.settimeout(CONNECT_LIMIT_S)
        self._sock.sendall(frame)

    def _next_frame(self, limit_s: float) -> tuple[int, bytes]:
        """One frame; _NotYet at the end of the connection or at the limit."""
        until = min(self._deadline, time.monotonic() + limit_s)
        while (frame := self._reader.next_frame()) is None:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise _NotYet("it said nothing")
            self._sock.settimeout(left_s)
            try:
                data = self._sock.recv(4096)
            except TimeoutError:
                raise _NotYet("it said nothing") from None
            if not data:
                raise _NotYet("it closed the connection")
            self._reader.feed(data)
        return frame


def _tokens_differ(sentence: str) -> RendezvousError:
    return RendezvousError(sentence, hint="set the same PACKCAST_TOKEN on both sides")


def _refused(answer: Abort) -> PackcastError:
    error = answer.error()
    return error if error.exit_code != 1 else RendezvousError(error.message, hint=error.hint)
