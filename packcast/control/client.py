"""A worker's end of the control channel: its connection to the sender, and received messages.

Knows no torch, and no meaning of messages except COMMIT's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from packcast.control.addresses import interface_of, text_of, with_interface
from packcast.control.channel import Channel, Log, OnFailure
from packcast.control.connection import Connection, Incident
from packcast.control.frames import ProtocolError
from packcast.control.handshake import Entered
from packcast.control.messages import Abort, Commit, Joined, JoinStatus, Message, limits_by
from packcast.control.rank_info import RankInfo
from packcast.errors import PackcastError, RendezvousError, TransferError

M = TypeVar("M", bound=Message)


class ControlClient(Channel):
    """A worker's connection, once `enter` has made it, until `close` or a failure.

    `on_failure(error)` is called once, on the control thread, when the sender is lost or gives up;
    `expect` and `await_joined` raise the same error. COMMIT counts on arrival, before any thread
    fetches it: the sender may exit a moment later. After that its loss only sets `lost`.
    """

    def __init__(self, entered: Entered, *, on_failure: OnFailure, log: Log) -> None:
        super().__init__(
            entered.transfer_id,
            heartbeat_timeout_s=entered.heartbeat_timeout_s,
            on_failure=on_failure,
            log=log,
        )
        self.sender = entered.welcome.sender
        self.lost: str | None = None
        self._heartbeat.interval_s = entered.welcome.heartbeat_interval_s
        self._me = entered.me
        self._world_size: int | None = None
        self._status: JoinStatus | None = None  # not yet taken by a waiting thread
        self._is_gone = False
        self._received: dict[int, deque[Message]] = {}
        local_address = text_of(entered.sock.getsockname())
        self._interface = interface_of(local_address)
        connection = Connection(
            entered.sock,
            entered.reader,
            self._loop,
            self._clock,
            text_of(entered.sock.getpeername()),
            local_address,
        )
        connection.info = self.sender
        connection.allow(limits_by("sender"))
        self._connection = connection
        self._serve(connection)
        # What followed the WELCOME is in the reader already: no socket event announces it.
        self._loop.call_soon(connection.take_frames)
        self._start()

    # For any thread.

    def host_told(self, host: str) -> str:
        """The sender's address from a message, with this host's interface if it is link-local."""
        return with_interface(host, self._interface)

    def await_joined(
        self, timeout_s: float, on_status: Callable[[JoinStatus], object] = lambda _: None
    ) -> tuple[RankInfo, int]:
        """This worker with its assigned rank, and the world size, once all have joined.

        `on_status` is called in this thread as others join. The sender names the missing ranks at
        its own deadline, so this one should be longer.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            news = self._ask(self._join_news, deadline - time.monotonic())
            if news is None:
                raise RendezvousError(f"not all ranks have joined within {timeout_s:g} s")
            status, joined = news
            if joined is not None:
                return joined
            if status is not None:
                on_status(status)

    def send(self, message: Message) -> None:
        """Send a message to the sender, if it is still there; raises the failure."""
        self.check()
        self._post(self._connection.send, message.encode())

    def expect(self, kind: type[M], timeout_s: float | None) -> M:
        """The sender's next message of this kind.

        Raises the failure, or TransferError at the time-out or if the sender is gone.
        """
        found = self._ask(lambda: self._take(kind), timeout_s)
        if found is None:
            raise TransferError(
                f"no {kind.__name__} from the sender, {self.sender.label}, in {timeout_s:g} s"
            )
        return cast("M", found)

    # For the control thread.

    def _join_news(self) -> tuple[JoinStatus | None, tuple[RankInfo, int] | None] | None:
        status, self._status = self._status, None
        joined = None if self._world_size is None else (self._me, self._world_size)
        return (status, joined) if status or joined else None

    def _take(self, kind: type[Message]) -> Message | None:
        messages = self._received.get(kind.kind)
        if messages:
            self._connection.count_fetched()
            return messages.popleft()
        if self._is_gone:
            why = self.lost or f"the sender, {self.sender.label}, left"
            raise TransferError(f"{why} before it sent {kind.__name__}")
        return None

    def _on_message(self, connection: Connection, message: Message) -> bool:
        if isinstance(message, Joined):
            if self._world_size is not None or message.rank >= message.world_size:
                raise ProtocolError("a Joined that makes no sense")
            self._me, self._world_size = replace(self._me, rank=message.rank), message.world_size
            return True
        if isinstance(message, JoinStatus):
            self._status = message
            return True
        if isinstance(message, Commit):
            self._settle()
            self._is_committed = self._is_committed or self._failure is None
        self._received.setdefault(message.kind, deque()).append(message)
        return False

    def _loss_of(self, connection: Connection, why: str | None) -> PackcastError:
        if self._world_size is not None:
            return super()._loss_of(connection, why)
        sentence = f"{self._name_of(connection)}, left before all had joined"
        return RendezvousError(f"{sentence}: {why}" if why else sentence)

    def _name_of(self, connection: Connection) -> str:
        return f"the sender, {connection.label}"

    def _on_abort(self, connection: Connection, message: Abort) -> None:
        # Every rank prints the sender's message unchanged. But "interrupted" alone would read as
        # if this rank had been interrupted.
        said_by = self._name_of(connection) if message.code > 128 else None
        self._part(Incident(connection, message.error(said_by=said_by)))

    def _part(self, incident: Incident) -> None:
        # Without a delay: no other connection could know the cause, and the store may go too.
        super()._part(incident)
        self._settle()

    def _note(self, connection: Connection, sentence: str | None) -> None:
        self._is_gone = True
        if sentence is not None:
            self.lost = self.lost or sentence
            self._log(sentence)
