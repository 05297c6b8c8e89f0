"""The sender's open port: strangers come in here, prove the token, and leave as members or not.

All bounded: bytes, time, and how many at once. What goes wrong here harms nobody inside.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

from packcast.errors import PackcastError, RendezvousError
from packcast.group import auth
from packcast.group.addresses import host_and_port, listening_socket, text_of
from packcast.group.loop import READ, ControlLoop
from packcast.group.member import Member
from packcast.group.peer import Peer, tune
from packcast.group.wire import (
    BEFORE_PROOF,
    PROTOCOL,
    FrameReader,
    Message,
    encode_frame,
    error_message,
)

HANDSHAKE_TIMEOUT_S = 10.0
REFUSED_LINGER_S = 2.0
PAUSE_S = 0.5
MAX_PENDING = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that never blocks; "" is every address.

    Raises RendezvousError where it cannot be had.
    """
    try:
        listener = listening_socket(host, port)
    except OSError as error:
        raise RendezvousError(
            f"cannot listen on {host_and_port(host or '*', port)}: {error.strerror or error}",
            hint="choose another port or address of this host",
        ) from error
    listener.setblocking(False)
    return listener


def welcome_message(me: Member, proof: str | None) -> Message:
    """What lets a worker in, and tells it who the sender is."""
    return {"kind": "WELCOME", "proof": proof, "member": me.to_json()}


class Door:
    """Accepts connections until `close`; on the control thread, but for the constructor.

    `on_hello(peer, member)` gets each peer that has proven itself: the caller answers with
    `welcome` or `refuse`. `on_apart(error)` hears of a proven peer with another protocol.
    """

    def __init__(
        self,
        listener: socket.socket,
        loop: ControlLoop,
        *,
        transfer_id: str,
        token: bytes | None,
        now: Callable[[], float],
        log: Callable[[str], None],
        on_hello: Callable[[Peer, Member], None],
        on_apart: Callable[[PackcastError], None],
    ) -> None:
        self._listener = listener
        self._loop = loop
        self._transfer_id = transfer_id
        self._token = token
        self._now = now
        self._log = log
        self._on_hello = on_hello
        self._on_apart = on_apart
        self._leave_at: dict[Peer, float] = {}
        self._refused: set[Peer] = set()
        self._open_at: float | None = None
        loop.watch(listener, READ, self._accept)

    def welcome(self, peer: Peer, me: Member) -> None:
        """Queue the answer that lets the worker in."""
        peer.queue(encode_frame(welcome_message(me, peer.proof), BEFORE_PROOF))
        peer.flush()

    def refuse(self, peer: Peer, error: PackcastError) -> None:
        """Say no with a reason, and close once the worker has read it; the peer is unwatched."""
        peer.queue(encode_frame(error_message("REFUSED", error), BEFORE_PROOF))
        peer.flush()
        self._refused.add(peer)
        self._leave_at[peer] = self._now() + REFUSED_LINGER_S
        self._loop.watch(peer.sock, READ, partial(self._on_ready, peer))

    def tick(self, now: float) -> None:
        """Send those away who take too long."""
        if self._open_at is not None and now >= self._open_at:
            self._open_at = None
            self._loop.watch(self._listener, READ, self._accept)
        for peer in [peer for peer, at in self._leave_at.items() if now >= at]:
            quiet = peer in self._refused
            self._forget(peer, None if quiet else f"no HELLO within {HANDSHAKE_TIMEOUT_S:g} s")

    def close(self) -> None:
        """Let nobody in any more."""
        self._loop.unwatch(self._listener)
        self._listener.close()
        for peer in list(self._leave_at):
            self._forget(peer, None)

    def _accept(self, _events: int) -> None:
        if len(self._leave_at) >= MAX_PENDING:
            self._pause()
            return
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, or a peer already gone: wait, the kernel keeps the others.
            self._log(f"a connection could not be accepted: {error.strerror}")
            self._pause()
            return
        try:
            tune(sock)
            met_at = text_of(sock.getsockname())
        except OSError:
            sock.close()
            return
        peer = Peer(sock, FrameReader(BEFORE_PROOF), self._now())
        peer.met_at = met_at
        peer.nonce = auth.new_nonce()
        self._leave_at[peer] = self._now() + HANDSHAKE_TIMEOUT_S
        self._loop.watch(sock, READ, partial(self._on_ready, peer))
        peer.queue(encode_frame(self._challenge(peer.nonce), BEFORE_PROOF))
        peer.flush()

    def _challenge(self, nonce: str) -> Message:
        return {
            "kind": "CHALLENGE",
            "protocol": PROTOCOL,
            "nonce": nonce,
            "transfer": self._transfer_id,
            "token": self._token is not None,
        }

    def _pause(self) -> None:
        # The socket stays ready: without a pause this thread would spin on it.
        self._loop.unwatch(self._listener)
        self._open_at = self._now() + PAUSE_S

    def _on_ready(self, peer: Peer, _events: int) -> None:
        more = peer.receive()
        if peer in self._refused:
            peer.reader = FrameReader(BEFORE_PROOF)  # whatever it says now, nobody keeps it
            if not more:
                self._forget(peer, None)
            return
        try:
            hello = peer.reader.next_message()
            if hello is not None:
                self._on_first_message(peer, hello)
        except ValueError as error:
            self._forget(peer, str(error))
            return
        if not more and peer in self._leave_at:
            self._forget(peer, "it left without a HELLO")

    def _on_first_message(self, peer: Peer, hello: Message) -> None:
        if hello["kind"] != "HELLO":
            raise ValueError("it does not say HELLO")
        error = self._fault(peer, hello)
        if error is None and hello.get("protocol") == PROTOCOL:
            member = Member.from_json(hello.get("member"))
            del self._leave_at[peer]
            self._loop.unwatch(peer.sock)
            self._on_hello(peer, member)
            return
        self._loop.unwatch(peer.sock)
        if error is not None:
            self._log(f"refused {peer.label}: its token is wrong")
            self.refuse(peer, error)
            return
        apart = auth.protocols_apart(_label_of(hello, peer), hello.get("protocol"))
        self.refuse(peer, apart)
        self._on_apart(apart)

    def _fault(self, peer: Peer, hello: Message) -> RendezvousError | None:
        if self._token is None:
            return None
        nonces = (peer.nonce, auth.nonce_of(hello))
        if not auth.same_proof(hello, auth.worker_proof(self._token, *nonces, self._transfer_id)):
            return auth.worker_proof_is_wrong()
        peer.proof = auth.sender_proof(self._token, *nonces, self._transfer_id)
        return None

    def _forget(self, peer: Peer, why: str | None) -> None:
        if why is not None:
            self._log(f"dropped {peer.label}: {why}")
        self._leave_at.pop(peer, None)
        self._refused.discard(peer)
        self._loop.unwatch(peer.sock)
        peer.close()


def _label_of(hello: Message, peer: Peer) -> str:
    # Another protocol's members may look different, so only what can be read is used.
    try:
        return Member.from_json(hello.get("member")).label
    except ValueError:
        return peer.label
