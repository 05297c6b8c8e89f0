"""A worker's end of the control channel: one connection to the sender, and what came through it.

Knows no torch, and nothing of what the messages are about, but for COMMIT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from packcast.errors import PackcastError, RendezvousError, TransferError
from packcast.group.addresses import interface_of, text_of, with_interface
from packcast.group.clock import Deadline
from packcast.group.endpoint import Endpoint, Finding, Log, OnFatal
from packcast.group.handshake import Welcome, knock
from packcast.group.member import MAX_RANK, Member
from packcast.group.peer import Peer
from packcast.group.wire import (
    FROM_SENDER,
    FROM_WORKER,
    RESERVED_KINDS,
    Message,
    WireError,
    encode_frame,
    error_of,
)


class Line(Endpoint):
    """A worker's connection, from `Line.connect` until `close` or a verdict.

    `on_fatal(error)` is called once, on the control thread, when the sender is lost or gives up;
    `expect` and `await_joined` raise the same error. COMMIT commits on arrival, before anybody
    fetches it: the sender may be gone a moment later. After that its loss only sets `lost`.
    """

    def __init__(
        self,
        welcome: Welcome,
        *,
        me: Member,
        heartbeat_timeout_s: float,
        on_fatal: OnFatal,
        log: Log,
    ) -> None:
        super().__init__(
            "packcast-line",
            outgoing=FROM_WORKER,
            heartbeat_timeout_s=heartbeat_timeout_s,
            on_fatal=on_fatal,
            log=log,
        )
        self.transfer_id = welcome.transfer_id
        self.sender = welcome.sender
        self.lost: str | None = None
        self._interface = interface_of(text_of(welcome.sock.getsockname()))
        self._me = me
        self._world_size: int | None = None
        self._gone = False
        welcome.reader.limits = FROM_SENDER
        self._peer = Peer(welcome.sock, welcome.reader, self._clock.read())
        self._peer.member = welcome.sender
        self._serve(self._peer)
        # What came right behind the WELCOME is in the reader already: no socket event tells.
        self._loop.post(partial(self._read, self._peer))
        self._start()

    @classmethod
    def connect(
        cls,
        hosts: Sequence[str],
        port: int,
        *,
        me: Member,
        token: bytes | None,
        join_timeout_s: float,
        heartbeat_timeout_s: float,
        on_fatal: OnFatal,
        log: Log,
        still_wanted: Callable[[], bool] = lambda: True,
    ) -> Line:
        """Join the sender at `port` of one of the `hosts`, waiting for it until the join timeout.

        Or until it is not `still_wanted`. Returns as soon as the sender has let this worker in.
        Raises RendezvousError with the sender's reason where it refuses.
        """
        me = Member.from_json(me.to_json())
        welcome = knock(
            hosts,
            port,
            me=me,
            token=token,
            join_timeout_s=join_timeout_s,
            log=log,
            still_wanted=still_wanted,
        )
        return cls(
            welcome, me=me, heartbeat_timeout_s=heartbeat_timeout_s, on_fatal=on_fatal, log=log
        )

    # For any thread.

    def host_told(self, host: str) -> str:
        """The sender's address, as the sender calls it, as it is called on this host."""
        return with_interface(host, self._interface)

    def await_joined(self, timeout_s: float | None) -> tuple[Member, int]:
        """This worker with the rank it got, and the world size, once everybody has joined.

        The sender names who is missing at its own deadline, so give this one a little longer.
        """
        found = self._inbox.wait_for(self._membership, Deadline(timeout_s))
        if found is None:
            raise RendezvousError(f"not everybody has joined within {timeout_s:g} s")
        return found

    def send(self, message: Message) -> None:
        """Send a message to the sender; raises the verdict. One already gone gets nothing."""
        if message["kind"] in RESERVED_KINDS:
            raise ValueError(f"{message['kind']} is the channel's own")
        if self._inbox.verdict is not None:
            raise self._inbox.verdict
        self._loop.post(partial(self._send_frame, encode_frame(message, FROM_WORKER)))

    def expect(self, kind: str, timeout_s: float | None) -> Message:
        """The sender's next message of this kind.

        Raises the verdict, or TransferError at the time-out or where the sender is gone.
        """
        found = self._inbox.wait_for(partial(self._take, kind), Deadline(timeout_s))
        if found is None:
            raise TransferError(
                f"no {kind} from the sender, {self.sender.label}, in {timeout_s:g} s"
            )
        return found

    def progress(self) -> Message:
        """What the sender's newest heartbeat carried."""
        return self._peer.progress

    # For threads that hold the inbox's lock.

    def _membership(self) -> tuple[Member, int] | None:
        return None if self._world_size is None else (self._me, self._world_size)

    def _take(self, kind: str) -> Message | None:
        if self._peer.has(kind):
            return self._peer.take(kind)
        if self._gone:
            why = self.lost or f"the sender, {self.sender.label}, left"
            raise TransferError(f"{why} before it sent {kind}")
        return None

    # For the control thread.

    def _send_frame(self, frame: bytes) -> None:
        if self._peer.is_open:
            self._say(self._peer, frame)

    def _on_message(self, peer: Peer, message: Message) -> None:
        if message["kind"] == "JOINED":
            self._on_joined(message)
            return
        if message["kind"] == "COMMIT":
            with contextlib.suppress(PackcastError):  # this process gave up before
                self._inbox.commit()
        super()._on_message(peer, message)

    def _on_joined(self, message: Message) -> None:
        rank, world_size = message.get("rank"), message.get("world_size")
        if not (isinstance(rank, int) and isinstance(world_size, int)):
            raise WireError("JOINED without a rank")
        if self._world_size is not None or not 0 <= rank < MAX_RANK or world_size < 1:
            raise WireError("JOINED makes no sense")
        self._inbox.change(partial(self._set_joined, rank, world_size))

    def _set_joined(self, rank: int, world_size: int) -> None:
        self._me, self._world_size = replace(self._me, rank=rank), world_size

    def _loss_of(self, peer: Peer, why: str | None) -> PackcastError:
        if self._world_size is not None:
            return super()._loss_of(peer, why)
        sentence = f"the sender, {peer.label}, left before all had joined"
        return RendezvousError(f"{sentence}: {why}" if why else sentence)

    def _name_of(self, peer: Peer) -> str:
        return f"the sender, {peer.label}"

    def _on_abort(self, peer: Peer, message: Message) -> None:
        # The sender speaks for the group: its sentence is everybody's, word for word. But
        # "interrupted" alone would read as if this rank had been.
        self._drop(peer)
        code = message.get("code")
        was_interrupted = isinstance(code, int) and code > 128
        said_by = f"the sender, {peer.label}" if was_interrupted else None
        self._findings.append(Finding(peer, error_of(message, said_by=said_by)))

    def _note(self, peer: Peer, sentence: str | None) -> None:
        self._inbox.change(partial(self._set_gone, sentence))
        if sentence is not None:
            self._log(sentence)

    def _set_gone(self, sentence: str | None) -> None:
        self._gone = True
        self.lost = sentence if self.lost is None else self.lost
