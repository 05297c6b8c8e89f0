"""The sender's end of the control channel: joining, messages from workers, and lost workers.

Knows no torch, and no meaning of messages.
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from packcast.control.acceptor import Acceptor, raise_descriptor_limit
from packcast.control.addresses import (
    host_and_port,
    is_everywhere,
    is_loopback,
    text_of,
)
from packcast.control.channel import Channel, Log, OnFailure
from packcast.control.connection import Connection, Incident
from packcast.control.frames import Progress, heartbeat_interval_s
from packcast.control.membership import Expected, Membership, listed
from packcast.control.messages import (
    MAX_MISSING,
    MAX_SECONDS,
    Hello,
    Joined,
    JoinStatus,
    Message,
    Welcome,
    limits_by,
)
from packcast.control.rank_info import RankInfo
from packcast.errors import RendezvousError, TransferError

M = TypeVar("M", bound=Message)

OnJoin = Callable[[RankInfo, int, int], None]

_STATUS_EVERY_S = 1.0


class ControlServer(Channel):
    """Listens from the constructor on, until `close` or a failure.

    `expected` is the number of workers, or the ranks a launcher started (with or without mine).
    `on_failure(error)` is called once, on the control thread, when a worker is lost or gives up,
    after the others were notified; `gather` and `join` raise the same error. Without a launcher
    `me.rank` may be None: the sender is rank 0. `listener` is a socket of `listen`, which the
    server closes; workers may have connected to it already.
    """

    def __init__(
        self,
        expected: Expected,
        *,
        listener: socket.socket,
        me: RankInfo,
        transfer_id: str,
        token: bytes | None,
        heartbeat_timeout_s: float,
        on_failure: OnFailure,
        log: Log,
    ) -> None:
        self._membership = Membership(expected, me)
        self._is_guarded = token is not None
        raise_descriptor_limit()
        address = listener.getsockname()
        self.address: tuple[str, int] = (text_of(address), address[1])
        super().__init__(
            transfer_id,
            heartbeat_timeout_s=heartbeat_timeout_s,
            on_failure=on_failure,
            log=log,
        )
        interval_s = heartbeat_interval_s(heartbeat_timeout_s, self._membership.wanted)
        self._heartbeat.interval_s = interval_s
        welcome = Welcome(sender=self._membership.me, heartbeat_interval_s=interval_s)
        self._welcome = welcome.encode()
        self._from_worker = limits_by("worker")
        self._arrivals: list[tuple[RankInfo, int]] = []
        self._ranks: tuple[RankInfo, ...] | None = None
        self._by_rank: dict[int, Connection] = {}
        self._received: dict[int, dict[int, deque[Message]]] = {}  # by kind, then rank
        self._gone: set[int] = set()
        self._join_until = 0.0
        self._has_news = False  # of who has joined
        self.lost: dict[int, str] = {}
        self._acceptor = Acceptor(
            listener,
            self._loop,
            self._clock,
            transfer_id=transfer_id,
            token=token,
            log=self._log,
            on_hello=self._on_hello,
            on_mismatch=self._on_mismatch,
        )
        if self._membership.is_complete:
            self._complete_join()
        self._start()

    # For any thread.

    @property
    def wanted(self) -> int:
        """How many workers are expected."""
        return self._membership.wanted

    @property
    def ranks_to_come(self) -> frozenset[int]:
        """The workers' ranks under a launcher; else none."""
        expected = self._membership.expected
        return frozenset() if isinstance(expected, int) else expected - {self._membership.me.rank}

    def join(self, limit_s: float, on_join: OnJoin) -> tuple[RankInfo, ...]:
        """All ranks in order, once every worker has joined; call it once.

        `on_join(worker, joined, wanted)` is called in this thread for each arrival. At the limit
        all ranks are notified, and RendezvousError names the missing ones.
        """
        self._post(self._begin_join, limit_s)
        while True:
            news = self._ask(self._join_news, None)
            assert news is not None
            arrivals, ranks = news
            for worker, joined in arrivals:
                on_join(worker, joined, self._membership.wanted)
            if ranks is not None:
                return ranks

    def host_met(self) -> str:
        """The address of this host that the workers have used, once they have joined.

        Not loopback, if possible: only workers on this host can have used it.
        """
        counts = Counter(connection.local_address for connection in self._by_rank.values())
        return max(counts, key=lambda host: (not is_loopback(host), counts[host]))

    def send(self, rank: int, message: Message) -> None:
        """Send a message to one worker, if it is still there; raises the failure."""
        self._send_all([self._by_rank[rank]], message)

    def broadcast(self, message: Message) -> None:
        """Send a message, encoded once, to every worker; raises the failure."""
        self._send_all(list(self._by_rank.values()), message)

    def gather(self, kind: type[M], timeout_s: float | None) -> dict[int, M]:
        """The next message of this kind from every worker, by rank.

        Raises the failure, or TransferError naming the silent at the time-out. Once committed,
        workers that are gone or silent are left out.
        """
        found = self._ask(lambda: self._take_all(kind), timeout_s)
        if found is None:
            found = self._ask(lambda: self._take_late(kind, timeout_s), None)
        assert found is not None
        return cast("dict[int, M]", found)

    def progress_by_worker(self) -> dict[int, Progress]:
        """Each worker's newest heartbeat, by rank."""
        return {rank: one.progress for rank, one in list(self._by_rank.items())}

    def _send_all(self, connections: list[Connection], message: Message) -> None:
        self.check()
        self._post(self._send_frame, connections, message.encode())

    # For the control thread: joining.

    def _on_hello(self, connection: Connection, hello: Hello) -> None:
        worker = hello.info
        twin = self._membership.holder_of(worker.rank)
        if isinstance(twin, Connection):
            twin.read()  # if it died and came back, its EOF is in the socket
        connection.info = worker
        connection.allow(self._from_worker)
        if self._failure is not None:
            self._acceptor.refuse(connection, self._failure)
            return
        no = self._membership.refusal(worker)
        is_late = self._ranks is not None
        if no is not None and no.fatal and self._is_guarded and not is_late:
            self._serve(connection)
            self._fail_join(no.error)
        elif no is not None or is_late:
            late = RendezvousError(f"{worker.label} has come too late: the transfer has begun")
            error = late if no is None else no.error
            self._acceptor.refuse(connection, error)
            self._log(f"refused: {error.message}")
        else:
            self._admit(connection, hello)

    def _admit(self, connection: Connection, hello: Hello) -> None:
        self._membership.add(connection, hello.info)
        self._serve(connection)
        connection.send(self._welcome)
        # Its limit may be shorter than mine, so my heartbeats must be as frequent as it needs.
        mine = heartbeat_interval_s(hello.heartbeat_timeout_s, self._membership.wanted)
        self._heartbeat.interval_s = min(self._heartbeat.interval_s, mine)
        self._arrivals.append((hello.info, len(self._membership)))
        self._has_news = True
        if self._membership.is_complete:
            self._complete_join()
        self._waiters.changed()

    def _on_mismatch(self, error: RendezvousError) -> None:
        if self._is_guarded and self._ranks is None:
            self._fail_join(error)
        else:
            self._log(f"refused: {error.message}")

    def _fail_join(self, error: RendezvousError) -> None:
        if self._failure is None and not self._is_closing:
            self._calls_on_failure = True
            self._end(error)

    def _complete_join(self) -> None:
        ranked = self._membership.ranked()
        for key, worker in ranked.items():
            assert isinstance(key, Connection)
            assert worker.rank is not None
            key.info = worker
            self._by_rank[worker.rank] = key
        everybody = (self._membership.me, *ranked.values())
        self._ranks = tuple(sorted(everybody, key=lambda info: info.rank or 0))
        for rank, connection in self._by_rank.items():
            connection.send(Joined(rank=rank, world_size=len(self._ranks)).encode())

    def _begin_join(self, limit_s: float) -> None:
        self._loop.call_later(limit_s, self._expire_join, limit_s)
        self._join_until = self._loop.time() + limit_s
        self._tell_joined()

    def _tell_joined(self) -> None:
        """Those who wait hear who is there, at most once a second, however many are coming."""
        if self._ranks is not None or self._failure is not None:
            return
        if self._has_news and self._connections:
            self._has_news = False
            status = JoinStatus(
                joined=len(self._membership),
                wanted=self._membership.wanted,
                missing=self._membership.missing_ranks()[:MAX_MISSING],
                left_s=min(max(0.0, self._join_until - self._loop.time()), MAX_SECONDS),
            )
            self._send_frame(list(self._connections), status.encode())
        self._loop.call_later(max(_STATUS_EVERY_S, self._heartbeat.interval_s), self._tell_joined)

    def _join_news(
        self,
    ) -> tuple[list[tuple[RankInfo, int]], tuple[RankInfo, ...] | None] | None:
        new, self._arrivals = self._arrivals, []
        return (new, self._ranks) if new or self._ranks is not None else None

    def _expire_join(self, limit_s: float) -> None:
        if self._ranks is None:
            error = self._membership.missing(limit_s)
            if address := self._acceptor.without_token:
                error.hint = (
                    f"a process at {address} came without this token:"
                    " set the same PACKCAST_TOKEN on both sides"
                )
            elif is_loopback(self.address[0]):
                error.hint = (
                    f"this listens on {self.address[0]}, where only ranks of this host reach it: "
                    "the others need another address (--listen, MASTER_ADDR)"
                )
            elif not self._acceptor.was_reached:
                host, port = self.address
                where = host_and_port("HOST" if is_everywhere(host) else host, port)
                error.hint = (
                    f"nothing has connected to port {port}: start the workers sooner, or try"
                    f" `packcast doctor --reach {where}` on their hosts"
                )
            self._give_up(error)  # `join` raises it

    # For the control thread: afterwards.

    def _progress_now(self) -> Progress:
        """The whole group's, so that a rank does not take another's slowness for a stall."""
        mine = super()._progress_now()
        return replace(mine, moved=mine.moved + self.moved_elsewhere())

    def _send_frame(self, connections: list[Connection], frame: bytes) -> None:
        for connection in connections:
            connection.send(frame)

    def _on_message(self, connection: Connection, message: Message) -> bool:
        assert connection.info is not None
        rank = connection.info.rank
        if rank is None or self._ranks is None:
            return False  # no thread waits for messages before all have joined
        ranks = self._received.setdefault(message.kind, {})
        ranks.setdefault(rank, deque()).append(message)
        return False

    def _take_all(self, kind: type[Message]) -> dict[int, Message] | None:
        ranks = self._received.get(kind.kind, {})
        if len(ranks) + len(self._gone) < len(self._by_rank):
            return None  # the fast path, for most messages of a large group
        if any(rank not in ranks and rank not in self._gone for rank in self._by_rank):
            return None
        return self._take_any(kind)

    def _take_any(self, kind: type[Message]) -> dict[int, Message]:
        ranks = self._received.get(kind.kind, {})
        taken = {rank: ranks[rank].popleft() for rank in sorted(ranks)}
        for rank in taken:
            self._by_rank[rank].count_fetched()
        self._received[kind.kind] = {rank: rest for rank, rest in ranks.items() if rest}
        return taken

    def _take_late(self, kind: type[Message], timeout_s: float | None) -> dict[int, Message]:
        found = self._take_all(kind)
        if found is not None or self._is_committed:
            return found or self._take_any(kind)
        ranks = self._received.get(kind.kind, {})
        silent = [
            connection.label
            for rank, connection in sorted(self._by_rank.items())
            if rank not in self._gone and rank not in ranks
        ]
        raise TransferError(f"no {kind.__name__} from {listed(silent)} within {timeout_s:g} s")

    def _part(self, incident: Incident) -> None:
        # Without a launcher another worker may join; a launcher's rank does not come again.
        if self._ranks is not None or self._membership.is_launched:
            super()._part(incident)
            return
        connection = incident.connection
        self._drop(connection)
        self._membership.remove(connection)
        self._has_news = True
        if self._failure is None:  # or it leaves because it has heard of that
            self._log(f"{connection.label} left before all had joined")

    def _note(self, connection: Connection, sentence: str | None) -> None:
        if connection.info is None or connection.info.rank is None:
            return
        self._gone.add(connection.info.rank)
        if sentence is not None:
            self.lost[connection.info.rank] = sentence
            self._log(sentence)

    def _tick(self) -> None:
        super()._tick()
        self._acceptor.tick(self._clock.read())

    def _close_all(self) -> None:
        self._acceptor.close()
        super()._close_all()
