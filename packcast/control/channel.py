"""Common to both ends of the control channel: the thread, heartbeats, losses, the one failure.

One thread runs an asyncio event loop and owns all connections and all state; other threads ask it
(`_ask`) and wait. Not a thread for each worker: there may be ten thousand.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from packcast.control.clock import AwakeClock
from packcast.control.connection import Connection, Incident
from packcast.control.frames import Progress, heartbeat_frame, heartbeat_interval_s
from packcast.control.heartbeat import Heartbeat
from packcast.control.messages import Abort, Bye, Message, decode
from packcast.control.waiters import Waiters
from packcast.errors import PackcastError, TransferError

T = TypeVar("T")

OnFailure = Callable[[PackcastError], None]
Log = Callable[[str], None]

SETTLE_S = 0.02  # incidents within this time count as simultaneous
TELL_LIMIT_S = 0.7
FAIL_LIMIT_S = 1.0
CLOSE_LIMIT_S = 2.0

# The next step after a rank that closed its connection without a word: most were killed.
DIED_HINT = (
    "its own output says why, or the kernel's log if memory ran out; the same command again removes"
    " what it left of a copy, as `packcast clean` does"
)
_CLOSED = "the control channel is closed"


class Channel:
    """One end of the control channel, from `_start` to `close` or a failure.

    `on_failure` is called at most once, as the last act of the control thread: when another rank
    is lost or gives up, after the others were notified; it may end the process. `fail`, for a
    failure of this process, does not call it.
    """

    def __init__(
        self, transfer_id: str, *, heartbeat_timeout_s: float, on_failure: OnFailure, log: Log
    ) -> None:
        self.transfer_id = transfer_id
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._heartbeat = Heartbeat(heartbeat_interval_s(heartbeat_timeout_s, 1), self._log)
        self._on_failure = on_failure
        self._say_to_user = log
        self._loop = asyncio.SelectorEventLoop()
        self._loop.set_exception_handler(self._on_crash)
        self._tick_s = min(0.1, heartbeat_timeout_s / 16)
        self._clock = AwakeClock(4 * self._tick_s)
        self._thread = threading.Thread(target=self._run, name="packcast-control", daemon=True)
        self._lock = threading.Lock()
        self._is_over = False
        self._told = threading.Event()
        self._connections: dict[Connection, None] = {}
        self._waiters = Waiters(self._loop)
        self._incidents: list[Incident] = []
        self._failure: PackcastError | None = None
        self._is_committed = False
        self._is_closing = False
        self._calls_on_failure = False
        self._farewell: asyncio.Task[None] | None = None

    # For any thread.

    @property
    def failure(self) -> PackcastError | None:
        """Why the transfer has ended, once it has; never changes after that."""
        return self._failure

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self._failure is not None:
            raise self._failure

    def wait_failure(self, timeout_s: float) -> PackcastError | None:
        """Wait for the failure: the cause of a broken collective often arrives a moment later."""
        with contextlib.suppress(PackcastError):
            self._ask(lambda: None, timeout_s)
        return self._failure

    def follow(self, position: Callable[[], str], progress: Callable[[], Progress]) -> None:
        """Set the callbacks for this rank's progress, which run on the control thread.

        `position` is for the message about a lost rank, `progress` for the heartbeats.
        """
        self._heartbeat.position, self._heartbeat.progress = position, progress

    def moved_elsewhere(self) -> int:
        """A number that grows while bytes move on other ranks of the group."""
        return sum(connection.progress.moved for connection in list(self._connections))

    def be_patient(self, patience_s: float) -> None:
        """Announce that this process may miss heartbeats for so long; 0 ends that.

        For calls that hold the interpreter, such as the start of a device.
        """
        self._heartbeat.patience_s = patience_s
        self._post(self._beat)

    def commit(self) -> None:
        """The point of no return: later losses are recorded, not fatal. Raises the failure."""
        self._ask(self._try_commit, None)

    def fail(self, error: PackcastError) -> None:
        """This process gives up: send the others the reason, for at most a second; the first call
        decides."""
        self._post(self._give_up, error)
        if threading.current_thread() is not self._thread:
            self._told.wait(FAIL_LIMIT_S)

    def close(self) -> None:
        """Send BYE, which is no loss to the others once committed; at most two seconds."""
        self._post(self._say_goodbye)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_LIMIT_S)

    def _start(self) -> None:
        self._loop.call_soon(self._tick)
        self._thread.start()

    def _post(self, call: Callable[..., object], *arguments: object) -> bool:
        """Call this on the control thread, in order; False if that has ended."""
        with self._lock:
            if not self._is_over:
                self._loop.call_soon_threadsafe(call, *arguments)
            return not self._is_over

    def _ask(self, look: Callable[[], T | None], timeout_s: float | None) -> T | None:
        """The first result of `look`, which runs on the control thread after every change.

        None at the time-out. Raises what `look` raises, and the failure as soon as there is one.
        """
        future: Future[T | None] = Future()
        if not self._post(self._add_waiter, look, future, timeout_s):
            raise self._failure or TransferError(_CLOSED)
        return future.result()

    def _add_waiter(
        self, look: Callable[[], T | None], future: Future[T | None], timeout_s: float | None
    ) -> None:
        if self._failure is not None:
            future.set_exception(self._failure)
            return
        until = float("inf") if timeout_s is None else self._clock.read() + timeout_s
        self._waiters.add(look, future, until)

    # For the control thread: incoming messages.

    def _serve(self, connection: Connection) -> None:
        """Handle this connection's messages, and watch its heartbeats, from now on."""
        connection.on_frame = self._on_frame
        connection.on_end = self._lose
        connection.heard = self._clock.read()
        self._connections[connection] = None

    def _drop(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        connection.close()

    def _on_frame(self, connection: Connection, kind: int, body: bytes) -> None:
        self._beat_if_due()  # large messages of many ranks take longer than a beat
        message = decode(kind, body)
        if isinstance(message, Abort):
            self._on_abort(connection, message)
        elif isinstance(message, Bye):
            self._on_bye(connection)
        elif not self._on_message(connection, message):
            connection.count_kept(len(body))
        self._waiters.changed()

    def _on_message(self, connection: Connection, message: Message) -> bool:
        """Keep it for a waiting thread, and return False; True if it was handled at once."""
        raise NotImplementedError

    def _on_abort(self, connection: Connection, message: Abort) -> None:
        self._part(Incident(connection, message.error(said_by=connection.label)))

    def _on_bye(self, connection: Connection) -> None:
        if self._is_committed:
            self._drop(connection)
            self._note(connection, None)
        else:
            self._lose(connection, "it left before the end")

    def _lose(self, connection: Connection, why: str | None) -> None:
        """The connection has ended, or must be ended."""
        self._part(Incident(connection, self._loss_of(connection, why), is_loss=True))

    def _loss_of(self, connection: Connection, why: str | None) -> PackcastError:
        try:
            where = self._heartbeat.position()
        except Exception as error:
            self._log(f"the position is not known: {error!r}")
            where = ""
        sentence = f"lost {self._name_of(connection)}" + (f" at {where}" if where else "")
        if why:
            return TransferError(f"{sentence}: {why}")
        return TransferError(sentence, hint=DIED_HINT)

    def _name_of(self, connection: Connection) -> str:
        return connection.label

    def _note(self, connection: Connection, sentence: str | None) -> None:
        """A rank is gone and the transfer goes on: lost, as the sentence says, or after BYE."""
        raise NotImplementedError

    # For the control thread: heartbeats.

    def _tick(self) -> None:
        self._loop.call_later(self._tick_s, self._tick)
        self._beat_if_due()
        now = self._clock.read()
        self._waiters.expire(now)
        for connection in [c for c in self._connections if self._is_silent(c, now)]:
            connection.read()  # this thread may have been busy: read what has arrived
            if connection.is_open and self._is_silent(connection, self._clock.read()):
                self._lose_silent(connection)

    def _is_silent(self, connection: Connection, now: float) -> bool:
        silent_s = now - connection.heard
        return silent_s > self._heartbeat_timeout_s and silent_s > connection.progress.patience_s

    def _lose_silent(self, connection: Connection) -> None:
        error = self._loss_of(connection, f"no sign of life for {self._heartbeat_timeout_s:g} s")
        # If it is only frozen, it ends with the same message when it goes on.
        connection.send(Abort.of(error).encode())
        self._part(Incident(connection, error, is_loss=True))

    def _beat_if_due(self) -> None:
        if self._heartbeat.is_due(self._clock.read()):
            self._beat()

    def _beat(self) -> None:
        frame = heartbeat_frame(self._progress_now())
        for connection in list(self._connections):
            # Behind a large message heartbeats would pile up, and its bytes are a sign of life too.
            if not connection.has_unsent:
                connection.send(frame)

    def _progress_now(self) -> Progress:
        return self._heartbeat.content()

    # For the control thread: the end.

    def _part(self, incident: Incident) -> None:
        """Close the connection. The transfer ends a moment later, by the incident of that moment
        that is most likely its cause."""
        self._drop(incident.connection)
        if not self._incidents:
            self._loop.call_later(SETTLE_S, self._settle)
        self._incidents.append(incident)

    def _settle(self) -> None:
        incidents, self._incidents = self._incidents, []
        if not incidents or self._failure is not None or self._is_closing:
            return
        if self._is_committed:
            for incident in incidents:
                self._note(incident.connection, incident.error.message)
            self._waiters.changed()
            return
        self._calls_on_failure = True
        self._end(max(incidents, key=lambda incident: incident.weight).error)

    def _try_commit(self) -> bool:
        self._settle()
        self.check()
        self._is_committed = True
        return True

    def _give_up(self, error: PackcastError) -> None:
        if self._failure is None and not self._is_closing:
            self._end(error)

    def _end(self, error: PackcastError) -> None:
        """The only place that sets the failure: wake waiting threads, then notify the others."""
        self._failure = error
        self._waiters.end(error)
        self._leave(Abort.of(error))

    def _say_goodbye(self) -> None:
        if self._failure is None and not self._is_closing:
            self._is_closing = True
            self._leave(Bye())

    def _leave(self, last_word: Message) -> None:
        self._farewell = self._loop.create_task(self._tell(last_word.encode()))

    async def _tell(self, frame: bytes) -> None:
        """Send the frame to all, and wait a little until it is acknowledged.

        When a process exits, its host may answer a late packet with a reset, and unacknowledged
        bytes are lost. So sent is not enough.
        """
        try:
            waiting = list(self._connections)
            for connection in waiting:
                connection.send(frame)
            end = time.monotonic() + TELL_LIMIT_S
            while waiting and time.monotonic() < end:
                waiting = [connection for connection in waiting if not connection.all_arrived]
                await asyncio.sleep(0.005 if waiting else 0)
        finally:
            self._loop.stop()

    def _on_crash(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        failure = PackcastError(f"the control channel failed: {error or context.get('message')!r}")
        failure.__cause__ = error
        if self._failure is None and not self._is_committed and not self._is_closing:
            self._calls_on_failure = True
            self._end(failure)
        else:
            self._log(failure.message)

    def _log(self, line: str) -> None:
        with contextlib.suppress(Exception):  # a closed terminal is no reason to end a transfer
            self._say_to_user(line)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            with self._lock:
                self._is_over = True
            self._close_all()
            self._loop.run_until_complete(asyncio.sleep(0))  # run what was posted before
            self._loop.close()
            self._waiters.end(self._failure or TransferError(_CLOSED))
            self._heartbeat.forget()
            self._told.set()
        if self._calls_on_failure and self._failure is not None:
            try:
                self._on_failure(self._failure)
            except Exception as error:
                self._log(f"leaving failed: {error!r}")

    def _close_all(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
