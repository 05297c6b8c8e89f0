"""What both ends of the control channel share: heartbeats, losses, the verdict, leaving.

Methods without an underscore are for any thread; all others run on the control thread, which
alone touches the peers' sockets. Knows nothing of joining or of what the messages are about.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from packcast.errors import PackcastError, TransferError
from packcast.group.clock import AwakeClock
from packcast.group.inbox import Inbox
from packcast.group.loop import READ, WRITE, ControlLoop
from packcast.group.peer import Peer
from packcast.group.wire import (
    FROM_WORKER,
    RESERVED_KINDS,
    Limits,
    Message,
    WireError,
    encode_frame,
    error_message,
    error_of,
)

HEARTBEAT_INTERVAL_S = 0.5
TELL_BOUND_S = 0.7
ABORT_BOUND_S = 1.0
CLOSE_BOUND_S = 2.0

OnFatal = Callable[[PackcastError], None]
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that ends the transfer, unless it is committed: one peer, and what became of it."""

    peer: Peer
    error: PackcastError

    @property
    def weight(self) -> int:
        """Which of several findings of one moment is the cause rather than a consequence.

        A rank that names a reason of its own knows best; one that only says that the transfer
        broke, or that it was interrupted, may have been struck by another's death.
        """
        return 1 if isinstance(self.error, TransferError) else 3


@dataclass(frozen=True, slots=True)
class Loss(Finding):
    """A peer that is gone, or has to be treated as gone."""

    @property
    def weight(self) -> int:
        return 2


class Endpoint:
    """One end of the control channel, served by one thread from `_start` to `close` or a verdict.

    `on_fatal` is called at most once, on the control thread, with no lock held, after the others
    were told; it may end the process.
    """

    def __init__(
        self,
        name: str,
        *,
        outgoing: Limits,
        heartbeat_timeout_s: float,
        on_fatal: OnFatal,
        log: Log,
    ) -> None:
        self._outgoing = outgoing
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_fatal = on_fatal
        self._say_to_user = log
        self._inbox = Inbox()
        self._clock = AwakeClock(min(HEARTBEAT_INTERVAL_S, heartbeat_timeout_s / 4))
        self._peers: list[Peer] = []
        self._findings: list[Finding] = []
        self._armed = False
        self._next_beat = 0.0
        self._position: Callable[[], str] = str
        self._payload: Callable[[], Message] = dict
        self._payload_failed = False
        self._told = threading.Event()
        self._loop = ControlLoop(
            name, tick=self._tick, crashed=self._crashed, ended=self._on_loop_end
        )

    # For any thread.

    @property
    def verdict(self) -> PackcastError | None:
        """Why the transfer ended, once it has."""
        return self._inbox.verdict

    def wait_verdict(self, timeout_s: float) -> PackcastError | None:
        """The verdict, waited for: what broke a collective is often known here a moment later."""
        return self._inbox.wait_verdict(timeout_s)

    def arm(self, position: Callable[[], str]) -> None:
        """Heartbeat deadlines count from now on, for each peer that has armed its own end too.

        `position()` says how far the transfer is, for the sentence about a lost rank; it is called
        on the control thread.
        """
        self._position = position
        self._loop.post(self._arm)

    def set_progress(self, payload: Callable[[], Message]) -> None:
        """What my heartbeats carry: a small JSON object, asked for on the control thread."""
        self._payload = payload

    def committed(self) -> None:
        """The point of no return: from now on a loss is noted, not fatal. Raises the verdict."""
        self._inbox.commit()

    def abort(self, error: PackcastError) -> None:
        """Tell the other side why this process gives up; at most a second, first call wins."""
        if self._inbox.give_up(error):
            self._loop.post(partial(self._tell, error))
        if not self._loop.is_current():
            self._told.wait(ABORT_BOUND_S)

    def close(self) -> None:
        """Say good-bye, which is no death to the others once committed; at most two seconds."""
        if self._inbox.close():
            self._loop.post(self._say_goodbye)
        if not self._loop.is_current():
            self._loop.join(CLOSE_BOUND_S)

    # For the control thread.

    def _start(self) -> None:
        self._loop.start()

    def _serve(self, peer: Peer) -> None:
        self._peers.append(peer)
        self._loop.watch(peer.sock, READ, partial(self._on_ready, peer))

    def _drop(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
        self._loop.unwatch(peer.sock)
        peer.close()

    def _say(self, peer: Peer, frame: bytes) -> None:
        peer.queue(frame)
        if peer.overrun:
            self._lose(peer, "it does not take in what is sent to it")
            return
        peer.flush()
        self._watch_for_more(peer)

    def _watch_for_more(self, peer: Peer) -> None:
        if peer.is_open:
            self._loop.rewatch(peer.sock, READ | WRITE if peer.has_unsent else READ)

    def _on_ready(self, peer: Peer, events: int) -> None:
        if events & WRITE:
            peer.flush()
        if events & READ:
            self._read(peer)
        self._watch_for_more(peer)

    def _read(self, peer: Peer) -> None:
        before = peer.num_received
        more = peer.receive()
        if peer.num_received > before:
            peer.heard = self._clock.read()
        try:
            while peer.is_open and (message := peer.reader.next_message()) is not None:
                self._on_message(peer, message)
                self._beat_if_due()  # large messages of many peers take longer than a beat
        except WireError as error:
            self._lose(peer, f"it broke the protocol: {error}")
        # Last, so that whatever was said before the end still counts, an ABORT above all.
        if not more and peer.is_open:
            self._lose(peer, None)

    def _on_message(self, peer: Peer, message: Message) -> None:
        kind = str(message["kind"])
        if kind == "HEARTBEAT":
            progress = message.get("progress")
            if isinstance(progress, dict):
                peer.progress = progress
        elif kind == "ARMED":
            peer.armed = True
        elif kind == "ABORT":
            self._on_abort(peer, message)
        elif kind == "BYE":
            self._on_bye(peer)
        elif kind in RESERVED_KINDS:
            raise WireError(f"it said {kind} out of turn")
        else:
            self._inbox.change(partial(peer.store, kind, message))

    def _on_abort(self, peer: Peer, message: Message) -> None:
        self._drop(peer)
        self._findings.append(Finding(peer, error_of(message, said_by=peer.label)))

    def _on_bye(self, peer: Peer) -> None:
        peer.said_bye = True
        if self._inbox.committed:
            self._drop(peer)
            self._note(peer, None)
        else:
            self._lose(peer, "it left before the end")

    def _lose(self, peer: Peer, why: str | None) -> None:
        """The peer is gone: its connection ended, or it has to be ended."""
        self._drop(peer)
        self._findings.append(Loss(peer, self._loss_of(peer, why)))

    def _loss_of(self, peer: Peer, why: str | None) -> PackcastError:
        where = self._where()
        sentence = f"lost {self._name_of(peer)}" + (f" at {where}" if where else "")
        return TransferError(f"{sentence}: {why}" if why else sentence)

    def _name_of(self, peer: Peer) -> str:
        return peer.label

    def _where(self) -> str:
        try:
            return self._position()
        except Exception as error:
            self._log(f"the position is not known: {error!r}")
            return ""

    def _note(self, peer: Peer, sentence: str | None) -> None:
        """A peer is gone and the transfer goes on: lost for the reason given, or with a BYE."""
        raise NotImplementedError

    def _arm(self) -> None:
        self._armed = True
        now = self._clock.read()
        for peer in list(self._peers):
            peer.heard = now
            self._say(peer, encode_frame({"kind": "ARMED"}, self._outgoing))

    def _tick(self) -> None:
        self._beat_if_due()
        for peer in list(self._peers):
            if self._is_silent(peer):
                # This thread may have been busy with others: what has come by now counts.
                self._read(peer)
            if peer.is_open and self._is_silent(peer):
                self._lose_silent(peer)
        self._settle()

    def _is_silent(self, peer: Peer) -> bool:
        if not (self._armed and peer.armed):
            return False
        return self._clock.read() - peer.heard > self._heartbeat_timeout_s

    def _beat_if_due(self) -> None:
        now = self._clock.read()
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_INTERVAL_S
            self._beat()

    def _lose_silent(self, peer: Peer) -> None:
        error = self._loss_of(peer, f"no sign of life for {self._heartbeat_timeout_s:g} s")
        # It may only be frozen: told, it ends with the same sentence when it goes on.
        peer.queue(encode_frame(error_message("ABORT", error), FROM_WORKER))
        peer.flush()
        self._drop(peer)
        self._findings.append(Loss(peer, error))

    def _beat(self) -> None:
        try:
            frame = encode_frame({"kind": "HEARTBEAT", "progress": self._payload()}, FROM_WORKER)
        except Exception as error:
            if not self._payload_failed:
                self._log(f"heartbeats carry no progress: {error!r}")
            self._payload_failed = True
            frame = encode_frame({"kind": "HEARTBEAT", "progress": {}}, FROM_WORKER)
        for peer in list(self._peers):
            # Behind something large it would only pile up, and bytes are a sign of life themselves.
            if not peer.has_unsent:
                self._say(peer, frame)

    def _settle(self) -> None:
        """Judge what this round has found, the likeliest cause first."""
        findings, self._findings = self._findings, []
        if not findings:
            return
        outcome = self._judge(max(findings, key=lambda finding: finding.weight).error)
        if outcome == "late":
            for finding in findings:
                self._note(finding.peer, finding.error.message)

    def _judge(self, error: PackcastError) -> str:
        outcome = self._inbox.judge(error)
        if outcome == "fatal":
            for step in (self._tell, self._on_fatal):
                try:
                    step(error)
                except Exception as failure:
                    self._log(f"leaving failed: {failure!r}")
            self._loop.stop()
        return outcome

    def _tell(self, error: PackcastError) -> None:
        """Tell every peer, wait a little for the words to arrive, and end the loop."""
        frame = encode_frame(error_message("ABORT", error), FROM_WORKER)
        for peer in self._peers:
            peer.queue(frame)
        self._linger(TELL_BOUND_S)
        self._told.set()
        self._loop.stop()

    def _say_goodbye(self) -> None:
        for peer in self._peers:
            peer.queue(encode_frame({"kind": "BYE"}, self._outgoing))
        self._linger(TELL_BOUND_S)
        self._loop.stop()

    def _linger(self, bound_s: float) -> None:
        # A process that exits takes unacknowledged bytes with it where its host answers a late
        # packet with a reset. So: not sent, but arrived.
        end = time.monotonic() + bound_s
        waiting = list(self._peers)
        while waiting:
            for peer in waiting:
                peer.flush()
                peer.discard_received()
            waiting = [peer for peer in waiting if not peer.all_arrived]
            if time.monotonic() > end:
                return
            if waiting:
                time.sleep(0.005)

    def _log(self, line: str) -> None:
        with contextlib.suppress(Exception):  # a closed terminal is no reason to end a transfer
            self._say_to_user(line)

    def _crashed(self, error: Exception) -> None:
        failure = PackcastError(f"the control channel failed: {error!r}")
        failure.__cause__ = error
        if self._judge(failure) == "late":
            self._log(failure.message)

    def _on_loop_end(self) -> None:
        for peer in list(self._peers):
            self._drop(peer)
        # A channel is a cycle of objects, and what these belong to has large buffers.
        self._position, self._payload = str, dict
        self._told.set()
