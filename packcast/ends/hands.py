"""Who does the jobs of an end: threads of this process, or helper processes; one interface.

Knows jobs and memory; not what the bytes are for, nor in which order they are wanted.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from packcast.ends.arena import Arena
from packcast.ends.hand import (
    HELLO,
    MAX_DESCRIPTORS,
    MAX_MESSAGE_NBYTES,
    PARENTS_SIGNALS,
    pack_jobs,
    unpack_outcomes,
)
from packcast.ends.syscalls import address_of
from packcast.ends.work import Job, Outcome, perform
from packcast.errors import PackcastError, TransferError, as_packcast_error
from packcast.units import MIB

Done = Callable[[Outcome], None]  # called once for each job, in some thread; must not raise
Order = tuple[Job, memoryview, Done]  # a job, the memory that is exactly its bytes, who is told

CLOSE_LIMIT_S = 1.0  # for threads and helpers at the end: after a failure some are stuck in I/O
_READY_LIMIT_S = 5.0  # for helpers at the beginning; they take a tenth of a second
_LOOK_S = 0.25  # how often the helpers are looked at
THREADS_PER_HELPER = 4  # so many share one interpreter well
# A message is as much as one helper's threads do at a time, and each costs us the same.
_BATCH_NBYTES = 16 * MIB
_BATCH_JOBS = 64
# Of one message, or of all that are under way: descriptors count against a limit that all processes
# of a user share.
_TOO_MUCH = (errno.ETOOMANYREFS, errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM)
_SMALL_NBYTES = 64 * 1024  # done at once here: the way to a helper would take longer
# Isolated and without site: nothing but what the parent has imported from, and no delay.
_PYTHON = (sys.executable, "-I", "-S", "-c")
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from packcast.ends.hand import main; main()"
)


class ThreadHands:
    """`count` threads of this process."""

    def __init__(self, count: int, name: str) -> None:
        self._jobs: SimpleQueue[Order | None] = SimpleQueue()
        self._ended_by: PackcastError | None = None
        self._ending = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"packcast-{name}-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def await_ready(self, limit_s: float = _READY_LIMIT_S) -> None:
        """Threads are at once."""

    def submit(self, orders: Sequence[Order]) -> None:
        """Do the jobs, at any time and in any order, and tell how each went; even after the end."""
        with self._ending:  # behind the last one's end nobody would ever find it
            ended_by = self._ended_by
            if not ended_by:
                for order in orders:
                    self._jobs.put(order)
        if ended_by:
            _refuse(orders, ended_by)

    def close(self) -> None:
        """End the threads, and wait a moment for that; jobs that nobody has begun are over."""
        with self._ending:
            self._ended_by = TransferError("the transfer is over")
            for _ in self._threads:
                self._jobs.put(None)
        join_all(self._threads, CLOSE_LIMIT_S)

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, memory, done = entry
            ended_by = self._ended_by
            done(Outcome(error=ended_by) if ended_by else _performed(job, memory))


class ProcessHands:
    """`count` threads of helper processes, which have the arena mapped; jobs lie in its memory.

    They all take from one socket and answer on another, so the kernel spreads the work and one
    thread here hears of the results. Any helper's end before `close` ends it all.
    """

    def __init__(
        self, arena: Arena, count: int, name: str, *, threads_each: int = THREADS_PER_HELPER
    ) -> None:
        self._arena = arena
        num_helpers = -(-count // threads_each)
        # One batch that each of them does, and some that wait for who is ready first.
        self._limit = num_helpers + max(1, num_helpers // 2)
        self._changed = threading.Condition()
        self._pending: dict[int, list[Order]] = {}
        self._next_ticket = 0
        self._num_ready = 0
        self._ended_by: PackcastError | None = None
        self._jobs, their_jobs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._replies, their_replies = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        timeout = struct.pack("@ll", 0, int(_LOOK_S * 1e6))
        self._replies.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._listener = threading.Thread(
            target=self._listen, name=f"packcast-{name}-helpers", daemon=True
        )
        shares = [count // num_helpers + (i < count % num_helpers) for i in range(num_helpers)]
        try:
            with their_jobs, their_replies:
                self._start_helpers(shares, their_jobs, their_replies)
            self._listener.start()
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise TransferError(
                f"this host cannot start a helper process: {error.strerror}"
            ) from error

    def await_ready(self, limit_s: float = _READY_LIMIT_S) -> None:
        """Block until all helpers are there, so that the first bytes do not wait for the last one;
        but no longer, since one alone does it too."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended_by or self._num_ready == len(self._helpers), limit_s
            )

    def submit(self, orders: Sequence[Order]) -> None:
        """Do the jobs, at any time and in any order, and tell how each went; even after the end.

        Blocks while the helpers have enough to do.
        """
        batch: list[Order] = []
        nbytes = 0
        for order in orders:
            job, memory, done = order
            if job.nbytes <= _SMALL_NBYTES:
                done(_performed(job, memory))
                continue
            if batch and (nbytes + job.nbytes > _BATCH_NBYTES or len(batch) == _BATCH_JOBS):
                self._submit_batch(batch)
                batch, nbytes = [], 0
            batch.append(order)
            nbytes += job.nbytes
        if batch:
            self._submit_batch(batch)

    def close(self) -> None:
        """End the helpers; jobs that are not done are over.

        Where all is done they are not waited for: going takes them a tenth of a second.
        """
        with self._changed:
            is_quiet = self._listener.is_alive() and not self._pending and not self._ended_by
        self._fail(TransferError("the transfer is over"))
        for end in (self._jobs, self._replies):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # end of file ends them
        if not (is_quiet and _reap_later(self._helpers)):
            _reap(self._helpers)
        if self._listener.ident is not None:
            self._listener.join(CLOSE_LIMIT_S)
        self._jobs.close()
        self._replies.close()

    def _submit_batch(self, batch: list[Order]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended_by or len(self._pending) < self._limit)
            ended_by, ticket = self._ended_by, self._next_ticket
            if not ended_by:
                self._next_ticket += 1
                self._pending[ticket] = batch
        if ended_by:
            _refuse(batch, ended_by)
        elif not self._send(ticket, batch) and self._take(ticket):
            half = len(batch) // 2
            if half:
                self._submit_batch(batch[:half])
                self._submit_batch(batch[half:])
            else:
                job, memory, done = batch[0]
                done(_performed(job, memory))

    def _start_helpers(
        self, shares: Sequence[int], jobs: socket.socket, replies: socket.socket
    ) -> None:
        # Blocked in the helpers from their first moment on, until they ignore them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
        try:
            for num_threads in shares:
                self._helpers.append(_start(num_threads, jobs, replies, self._arena))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _send(self, ticket: int, batch: Sequence[Order]) -> bool:
        """False if no message can carry it."""
        base = self._arena.address
        jobs = [(address_of(memory) - base, job) for job, memory, _ in batch]
        message, descriptors = pack_jobs(ticket, jobs)
        if len(message) > MAX_MESSAGE_NBYTES or len(descriptors) > MAX_DESCRIPTORS:
            return False
        try:
            socket.send_fds(self._jobs, [message], descriptors)
        except OSError as error:
            if error.errno in _TOO_MUCH:
                return False
            # Its sockets go a moment before itself.
            obituary = self._obituary(patience_s=CLOSE_LIMIT_S)
            self._fail(obituary or TransferError("the helper processes are gone"))
        return True

    def _take(self, ticket: int) -> list[Order]:
        with self._changed:
            batch = self._pending.pop(ticket, [])
            self._changed.notify_all()
            return batch

    def _listen(self) -> None:
        try:
            self._hear_answers()
        except Exception as error:
            self._fail(as_packcast_error(error, "helpers"))

    def _hear_answers(self) -> None:
        look_at = time.monotonic() + _LOOK_S
        while self._ended_by is None:
            with suppress(BlockingIOError):
                message = self._replies.recv(MAX_MESSAGE_NBYTES)
                if message:
                    self._hear(message)
                else:
                    look_at = 0.0
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + _LOOK_S
                obituary = self._obituary()
                if obituary:
                    self._fail(obituary)

    def _hear(self, message: bytes) -> None:
        ticket, outcomes = unpack_outcomes(message)
        if ticket == HELLO:
            with self._changed:
                self._num_ready += 1
                self._changed.notify_all()
            return
        for (_, _, done), outcome in zip(self._take(ticket), outcomes, strict=False):
            done(outcome)

    def _obituary(self, patience_s: float = 0.0) -> TransferError | None:
        deadline = time.monotonic() + patience_s
        while (dead := _first_dead(self._helpers)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if dead is None:
            return None
        if dead.returncode >= 0:
            return TransferError(f"helper process {dead.pid} ended with code {dead.returncode}")
        return TransferError(
            f"helper process {dead.pid} was killed by {_signal_name(-dead.returncode)}",
            hint="the kernel's log tells whether the host ran out of memory",
        )

    def _fail(self, error: PackcastError) -> None:
        """The first call decides; what is under way is over with `error`."""
        with self._changed:
            if self._ended_by:
                return
            self._ended_by = error
            pending = list(self._pending.values())
            self._pending.clear()
            self._changed.notify_all()
        for batch in pending:
            _refuse(batch, error)


Hands = ThreadHands | ProcessHands


def _performed(job: Job, memory: memoryview) -> Outcome:
    try:
        return perform(job, memory)
    except Exception as error:
        return Outcome(error=as_packcast_error(error, job.task.name.lower()))


def _refuse(orders: Sequence[Order], error: PackcastError) -> None:
    for _, _, done in orders:
        done(Outcome(error=error))


def join_all(threads: list[threading.Thread], limit_s: float) -> bool:
    """Wait for the threads to end, `limit_s` for all of them together; True if they did."""
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # the real-time ones have none
        return f"signal {number}"


def _first_dead(helpers: Sequence[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes] | None:
    return next((helper for helper in helpers if helper.poll() is not None), None)


def _reap(helpers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for the helpers to end; those that do not in time are killed."""
    deadline = time.monotonic() + CLOSE_LIMIT_S
    for helper in helpers:
        try:
            helper.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            helper.kill()
            with suppress(subprocess.TimeoutExpired):
                helper.wait(_LOOK_S)


def _reap_later(helpers: Sequence[subprocess.Popen[bytes]]) -> bool:
    """The same, by a thread that has nothing else of ours: a tensor that it let go while the
    interpreter ends would abort the process. False where there can be no thread."""
    try:
        threading.Thread(target=_reap, args=(helpers,), name="packcast-reap", daemon=True).start()
    except RuntimeError:
        return False
    return True


def _start(
    num_threads: int, jobs: socket.socket, replies: socket.socket, arena: Arena
) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # where an editable install may have no path for it
    # A Path in it is no text, and nothing to the parent's own imports either.
    path = [entry for entry in sys.path if isinstance(entry, str)]
    path += [] if root in path else [root]
    inherited = (jobs.fileno(), replies.fileno(), arena.fd)
    numbers = map(str, (os.getpid(), num_threads, *inherited))
    return subprocess.Popen(
        [*_PYTHON, _PROGRAM, json.dumps(path), *numbers],
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
