"""A worker's way in: find the sender's port, prove the token, be welcomed or refused.

Blocking calls with one deadline over all of them; what the sender says is checked as well.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packcast.errors import PackcastError, RendezvousError
from packcast.group import auth
from packcast.group.addresses import connect, host_and_port, says_loopback
from packcast.group.member import Member
from packcast.group.peer import tune
from packcast.group.wire import (
    BEFORE_PROOF,
    PROTOCOL,
    FrameReader,
    Message,
    encode_frame,
    error_of,
)
from packcast.units import format_duration

RETRY_S = 0.2
RESOLVE_AGAIN_S = 1.0
CONNECT_TIMEOUT_S = 5.0
CHALLENGE_TIMEOUT_S = 10.0
APART_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Welcome:
    """An open connection on which the sender has let this worker in."""

    sock: socket.socket
    reader: FrameReader
    transfer_id: str
    sender: Member


def knock(
    hosts: Sequence[str],
    port: int,
    *,
    me: Member,
    token: bytes | None,
    join_timeout_s: float,
    log: Callable[[str], None],
    still_wanted: Callable[[], bool],
) -> Welcome:
    """Connect and be let in, at one of the `hosts`: what may be the sender's address, or its name.

    Tries again until the join timeout, since the worker may be first, and the name not be known
    yet; or until it is not `still_wanted`. Raises RendezvousError: nobody there, not let in, or
    another program at that address.
    """
    where = " or ".join(host_and_port(host, port) for host in hosts)
    deadline = time.monotonic() + join_timeout_s
    waiting = False
    while True:
        whys = []
        for host in hosts:
            try:
                return _try(host, port, me, token, deadline)
            except _NotYet as error:
                whys.append(error)
            except _Stranger:
                if len(hosts) == 1:
                    raise
                whys.append(_NotYet("another program is there"))
        why = ", ".join(dict.fromkeys(map(str, whys)))
        pause_s = max(error.pause_s for error in whys)
        if not still_wanted():
            raise RendezvousError(f"the sender at {where} is waited for no longer")
        if time.monotonic() + pause_s > deadline:
            raise RendezvousError(
                f"no sender at {where} within {format_duration(join_timeout_s)}: {why}",
                hint=_only_here(hosts)
                or "start `packcast send` there, or check the address and the firewall",
            )
        if not waiting:
            log(f"waiting for the sender at {where} ({why})")
        waiting = True
        time.sleep(pause_s)


class _NotYet(Exception):
    """Nobody to talk to there, for now."""

    def __init__(self, why: str, pause_s: float = RETRY_S) -> None:
        super().__init__(why)
        self.pause_s = pause_s


class _Stranger(RendezvousError):
    """Another program is there."""


def _only_here(hosts: Sequence[str]) -> str | None:
    if all(map(says_loopback, hosts)):
        return f"{hosts[0]} is this host itself: a sender on another host has another address"
    return None


def _try(host: str, port: int, me: Member, token: bytes | None, deadline: float) -> Welcome:
    sock = _connect(host, port, deadline)
    try:
        welcome = _enter(sock, host_and_port(host, port), me, token, deadline)
    except BaseException:
        sock.close()
        raise
    if welcome is None:
        sock.close()
        raise _NotYet("it closed the connection or said nothing")
    return welcome


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    left_s = max(0.1, deadline - time.monotonic())
    try:
        sock = connect(host, port, min(left_s, CONNECT_TIMEOUT_S))
        tune(sock)
    except socket.gaierror as error:
        # A service's name comes after its pods. Resolvers are shared, so they are asked less often.
        why = f"its name cannot be resolved: {(error.strerror or str(error)).lower()}"
        raise _NotYet(why, min(RESOLVE_AGAIN_S, max(left_s / 4, RETRY_S))) from None
    except TimeoutError:
        raise _NotYet("no answer") from None
    except OSError as error:
        raise _NotYet((error.strerror or "no connection").lower()) from None
    return sock


def _enter(
    sock: socket.socket, where: str, me: Member, token: bytes | None, deadline: float
) -> Welcome | None:
    """The handshake; None where the other side went away before it began: worth another try."""
    reader = FrameReader(BEFORE_PROOF)
    first = min(deadline, time.monotonic() + CHALLENGE_TIMEOUT_S)
    try:
        challenge = _next_message(sock, reader, first)
        if challenge is None:
            return None
        return _answer(sock, reader, challenge, where, me, token, deadline)
    except ValueError as error:
        raise _Stranger(
            f"what listens at {where} is not a packcast sender: {error}",
            hint="check the address and the port",
        ) from error
    except OSError as error:
        raise RendezvousError(
            f"the sender at {where} closed the connection: {error.strerror}"
        ) from error


def _answer(
    sock: socket.socket,
    reader: FrameReader,
    challenge: Message,
    where: str,
    me: Member,
    token: bytes | None,
    deadline: float,
) -> Welcome:
    if challenge["kind"] != "CHALLENGE":
        raise ValueError("it does not say CHALLENGE")
    nonces = (auth.nonce_of(challenge), auth.new_nonce())
    transfer = auth.transfer_of(challenge)
    apart = challenge.get("protocol") != PROTOCOL
    if not apart and token is None and challenge.get("token") is True:
        raise auth.worker_has_no_token(where)
    if not apart and token is not None and challenge.get("token") is not True:
        raise auth.sender_has_no_token(where)
    hello: Message = {
        "kind": "HELLO",
        "protocol": PROTOCOL,
        "nonce": nonces[1],
        "member": me.to_json(),
    }
    if token is not None:
        hello["proof"] = auth.worker_proof(token, *nonces, transfer)
    sock.settimeout(CONNECT_TIMEOUT_S)
    sock.sendall(encode_frame(hello, BEFORE_PROOF))
    if apart:
        # The sender has to hear of it too, and says it in the words that both then print.
        deadline = min(deadline, time.monotonic() + APART_TIMEOUT_S)
    answer = _next_message(sock, reader, deadline)
    if answer is not None and answer["kind"] in ("REFUSED", "ABORT"):
        raise _refused(answer)
    if apart:
        raise _apart(me, challenge.get("protocol"))
    if answer is None:
        raise RendezvousError(
            f"the sender at {where} closed the connection or did not let this worker in"
        )
    if answer["kind"] != "WELCOME":
        raise ValueError("it does not say WELCOME")
    if token is not None and not auth.same_proof(
        answer, auth.sender_proof(token, *nonces, transfer)
    ):
        raise auth.sender_proof_is_wrong(where)
    return Welcome(sock, reader, transfer, Member.from_json(answer.get("member")))


def _refused(answer: Message) -> PackcastError:
    error = error_of(answer)
    return error if error.exit_code != 1 else RendezvousError(error.message, hint=error.hint)


def _apart(me: Member, sender_protocol: object) -> RendezvousError:
    spoken = sender_protocol if isinstance(sender_protocol, int) else "unknown"
    return RendezvousError(
        f"{me.label} speaks protocol {PROTOCOL}, the sender protocol {spoken}",
        hint="install the same packcast on every host",
    )


def _next_message(sock: socket.socket, reader: FrameReader, deadline: float) -> Message | None:
    """One message, however slowly it drips; None at the end of the connection or the deadline."""
    while True:
        message = reader.next_message()
        if message is not None:
            return message
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return None
        sock.settimeout(left_s)
        try:
            data = sock.recv(4096)
        except TimeoutError:
            return None
        except ConnectionError:
            data = b""
        if not data:
            return None
        reader.feed(data)
