"""The sender's end of the control channel: who joins, what they say, and who is lost.

One thread serves every connection. Knows no torch, and nothing of what the messages are about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from packcast.errors import PackcastError, RendezvousError, TransferError
from packcast.group.addresses import is_loopback, text_of
from packcast.group.clock import Deadline
from packcast.group.door import Door, listen, welcome_message
from packcast.group.endpoint import Endpoint, Log, OnFatal
from packcast.group.member import Member
from packcast.group.peer import Peer
from packcast.group.roster import Expected, assign_ranks, missing, refusal, wanted
from packcast.group.wire import (
    BEFORE_PROOF,
    FROM_SENDER,
    FROM_WORKER,
    RESERVED_KINDS,
    Message,
    encode_frame,
)

OnJoin = Callable[[Member, int, int], None]

VERDICT_GRACE_S = 5.0


class Hub(Endpoint):
    """Listens from the constructor on, until `close` or a verdict.

    `on_fatal(error)` is called once, on the control thread, when a worker is lost or gives up
    after the others were told; `gather` and `join` raise the same error. `me.rank` may be None
    where no launcher gave one: the sender is rank 0 then. Raises RendezvousError where it cannot
    listen on `host:port`; port 0 takes a free one.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        me: Member,
        transfer_id: str,
        token: bytes | None,
        heartbeat_timeout_s: float,
        on_fatal: OnFatal,
        log: Log,
    ) -> None:
        # By way of JSON, so that what both sides compare was escaped in the same way.
        self._me = Member.from_json(me.to_json())
        encode_frame(welcome_message(self._me, None), BEFORE_PROOF)  # too large: said here
        listener = listen(host, port)
        address = listener.getsockname()
        self.address: tuple[str, int] = (text_of(address), address[1])
        super().__init__(
            "packcast-hub",
            outgoing=FROM_SENDER,
            heartbeat_timeout_s=heartbeat_timeout_s,
            on_fatal=on_fatal,
            log=log,
        )
        self._expected: Expected | None = None
        self._held: list[Peer] = []  # proven before `join` said who may come
        self._there: list[Peer] = []
        self._complete = False
        self._arrivals: list[tuple[Member, int]] = []
        self._members: tuple[Member, ...] | None = None
        self._by_rank: dict[int, Peer] = {}
        self._gone: set[int] = set()
        self.lost: dict[int, str] = {}
        self._door = Door(
            listener,
            self._loop,
            transfer_id=transfer_id,
            token=token,
            now=self._clock.read,
            log=self._log,
            on_hello=self._on_hello,
            on_apart=self._on_apart,
        )
        self._start()

    # For any thread.

    def join(self, expected: Expected, deadline_s: float, on_join: OnJoin) -> tuple[Member, ...]:
        """All members by rank, once every worker is there; call it once.

        `expected` is the number of workers, or the ranks a launcher started (mine among them or
        not). `on_join(member, joined, wanted)` is called in this thread for each arrival. At the
        deadline everybody is told, and RendezvousError names the missing.
        """
        self._loop.post(partial(self._begin_join, expected))
        deadline, expired, told = Deadline(deadline_s), False, 0
        while True:
            news = self._inbox.wait_for(partial(self._join_news, told), deadline)
            if news is None and expired:
                raise RendezvousError(f"the join did not end within {deadline_s:g} s")
            if news is None:
                # The control thread decides: the last one may be coming in this very moment.
                self._loop.post(partial(self._expire_join, deadline_s))
                deadline, expired = Deadline(VERDICT_GRACE_S), True
                continue
            arrivals, members = news
            for member, joined in arrivals:
                on_join(member, joined, wanted(expected, self._me))
            told += len(arrivals)
            if members is not None:
                return members

    def host_met(self) -> str:
        """The address of this host at which the workers have come, once they have joined.

        Those of this very host may have come by loopback, where the others cannot follow.
        """
        met = Counter(peer.met_at for peer in self._by_rank.values())
        return max(met, key=lambda host: (not is_loopback(host), met[host]))

    def send(self, rank: int, message: Message) -> None:
        """Send a message to one worker; raises the verdict. A worker already gone gets nothing."""
        frame = self._frame(message)
        self._loop.post(partial(self._send_to, [self._by_rank[rank]], frame))

    def broadcast(self, message: Message) -> None:
        """Send a message to every worker; raises the verdict."""
        frame = self._frame(message)
        self._loop.post(partial(self._send_to, list(self._by_rank.values()), frame))

    def gather(self, kind: str, timeout_s: float | None) -> dict[int, Message]:
        """The next message of this kind from every worker, by rank.

        Raises the verdict, or TransferError naming the silent at the time-out. Once committed,
        workers that are gone or silent are left out.
        """
        found = self._inbox.wait_for(partial(self._take_all, kind), Deadline(timeout_s))
        if found is None and self._inbox.committed:
            found = self._inbox.wait_for(partial(self._take_any, kind), Deadline(0))
        if found is not None:
            return found
        silent = [
            peer.label
            for rank, peer in sorted(self._by_rank.items())
            if rank not in self._gone and not peer.has(kind)
        ]
        raise TransferError(f"no {kind} from {', '.join(silent)} within {timeout_s:g} s")

    def progress(self) -> dict[int, Message]:
        """What each worker's newest heartbeat carried, by rank."""
        return {rank: peer.progress for rank, peer in self._by_rank.items()}

    def _frame(self, message: Message) -> bytes:
        if message["kind"] in RESERVED_KINDS:
            raise ValueError(f"{message['kind']} is the channel's own")
        if self._inbox.verdict is not None:
            raise self._inbox.verdict
        return encode_frame(message, FROM_SENDER)

    # For threads that hold the inbox's lock.

    def _join_news(
        self, told: int
    ) -> tuple[list[tuple[Member, int]], tuple[Member, ...] | None] | None:
        new = self._arrivals[told:]
        return (new, self._members) if new or self._members is not None else None

    def _take_all(self, kind: str) -> dict[int, Message] | None:
        for rank, peer in self._by_rank.items():
            if not peer.has(kind) and rank not in self._gone:
                return None
        return self._take_any(kind)

    def _take_any(self, kind: str) -> dict[int, Message]:
        return {rank: peer.take(kind) for rank, peer in self._by_rank.items() if peer.has(kind)}

    # For the control thread: joining.

    def _on_hello(self, peer: Peer, member: Member) -> None:
        peer.member = member
        peer.reader.limits = FROM_WORKER
        self._serve(peer)
        if self._expected is None:
            self._held.append(peer)
        else:
            self._admit(peer, member, self._expected)

    def _on_apart(self, error: PackcastError) -> None:
        if not self._complete:
            self._judge(error)

    def _begin_join(self, expected: Expected) -> None:
        self._expected = expected
        if isinstance(expected, int):
            self._me = replace(self._me, rank=0)
        held, self._held = self._held, []
        for peer in held:
            if peer.is_open and peer.member is not None:
                self._admit(peer, peer.member, expected)
        self._complete_join(expected)

    def _admit(self, peer: Peer, member: Member, expected: Expected) -> None:
        if member.rank is not None:
            for twin in [p for p in self._there if p.member and p.member.rank == member.rank]:
                self._read(twin)  # if it died and came back, its end waits in its socket
        no = refusal(expected, self._me, self._joined(), member)
        if no is not None and no.fatal and not self._complete:
            self._judge(no.error)
        elif no is not None or self._complete:
            late = RendezvousError(f"{member.label} has come too late: the transfer has begun")
            self._turn_away(peer, late if no is None else no.error)
        else:
            self._there.append(peer)
            self._door.welcome(peer, self._me)
            self._watch_for_more(peer)
            arrival = (member, len(self._there))
            self._inbox.change(lambda: self._arrivals.append(arrival))
            self._complete_join(expected)

    def _joined(self) -> list[Member]:
        return [peer.member for peer in self._there if peer.member is not None]

    def _turn_away(self, peer: Peer, error: RendezvousError) -> None:
        self._peers.remove(peer)
        self._loop.unwatch(peer.sock)
        self._door.refuse(peer, error)
        self._log(f"refused: {error.message}")

    def _complete_join(self, expected: Expected) -> None:
        if self._complete or len(self._there) < wanted(expected, self._me):
            return
        ranked = assign_ranks(expected, self._joined())
        by_rank: dict[int, Peer] = {}
        for peer, member in zip(self._there, ranked, strict=True):
            assert member.rank is not None
            peer.member = member
            by_rank[member.rank] = peer
        members = tuple(sorted((self._me, *ranked), key=lambda member: member.rank or 0))
        self._complete = True
        self._inbox.change(partial(self._open, by_rank, members))
        for rank, peer in by_rank.items():
            joined = {"kind": "JOINED", "rank": rank, "world_size": len(members)}
            self._say(peer, encode_frame(joined, FROM_SENDER))

    def _open(self, by_rank: dict[int, Peer], members: tuple[Member, ...]) -> None:
        self._by_rank, self._members = by_rank, members

    def _expire_join(self, deadline_s: float) -> None:
        if self._complete or self._expected is None:
            return
        error = missing(self._expected, self._me, self._joined(), deadline_s)
        if is_loopback(self.address[0]):
            error.hint = (
                f"this listens on {self.address[0]}, where only ranks of this host reach it: "
                "the others need another address (--listen, MASTER_ADDR)"
            )
        # No on_fatal: the thread that waits in `join` raises this very error.
        if self._inbox.judge(error) == "fatal":
            self._tell(error)

    # For the control thread: afterwards.

    def _send_to(self, peers: list[Peer], frame: bytes) -> None:
        for peer in peers:
            if peer.is_open:
                self._say(peer, frame)

    def _on_abort(self, peer: Peer, message: Message) -> None:
        # Without a launcher somebody else may come; a launcher's rank will not come again.
        if self._complete or isinstance(self._expected, frozenset):
            super()._on_abort(peer, message)
        else:
            self._forget(peer)

    def _lose(self, peer: Peer, why: str | None) -> None:
        if self._complete or isinstance(self._expected, frozenset):
            super()._lose(peer, why)
        else:
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        self._drop(peer)
        for known in (self._held, self._there):
            if peer in known:
                known.remove(peer)
        self._log(f"{peer.label} left before all had joined")

    def _note(self, peer: Peer, sentence: str | None) -> None:
        if peer.member is None or peer.member.rank is None:
            return
        self._inbox.change(partial(self._set_gone, peer.member.rank, sentence))
        if sentence is not None:
            self._log(sentence)

    def _set_gone(self, rank: int, sentence: str | None) -> None:
        self._gone.add(rank)
        if sentence is not None:
            self.lost[rank] = sentence

    def _tick(self) -> None:
        super()._tick()
        self._door.tick(self._clock.read())

    def _on_loop_end(self) -> None:
        self._door.close()
        super()._on_loop_end()
