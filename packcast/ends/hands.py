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
    MAX_DESCRIPTORS,
    MAX_MESSAGE_NBYTES,
    PARENTS_SIGNALS,
    pack_job,
    unpack_outcome,
)
from packcast.ends.syscalls import address_of
from packcast.ends.work import Job, Outcome, perform
from packcast.errors import PackcastError, TransferError, as_packcast_error

Done = Callable[[Outcome], None]  # called once for each job, in some thread; must not raise

CLOSE_LIMIT_S = 1.0  # for threads and helpers at the end: after a failure some are stuck in I/O
_LOOK_S = 0.25  # how often the helpers are looked at
_JOBS_PER_HELPER = 2  # one that is done, and the next one waiting for it
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
        self._jobs: SimpleQueue[tuple[Job, memoryview, Done] | None] = SimpleQueue()
        self._ended_by: PackcastError | None = None
        self._ending = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"packcast-{name}-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, memory: memoryview, done: Done) -> None:
        """Do the job in `memory`, which is exactly its bytes, and call `done`.

        Raises what ended them.
        """
        with self._ending:  # behind the last one's end nobody would ever find it
            if self._ended_by:
                raise self._ended_by
            self._jobs.put((job, memory, done))

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
            try:
                ended_by = self._ended_by
                outcome = Outcome(error=ended_by) if ended_by else perform(job, memory)
            except Exception as error:
                outcome = Outcome(error=as_packcast_error(error, job.task.name.lower()))
            done(outcome)


class ProcessHands:
    """`count` helper processes, which have the arena mapped; jobs lie in its memory.

    They all take from one socket and answer on another, so the kernel spreads the work and one
    thread here hears of the results. Any helper's end before `close` ends it all.
    """

    def __init__(self, arena: Arena, count: int, name: str) -> None:
        self._arena = arena
        self._limit = _JOBS_PER_HELPER * count
        # Who waits is woken for a batch of jobs: a thread switch for each would cost more than it.
        self._low = self._limit - max(1, count // 2)
        self._changed = threading.Condition()
        self._pending: dict[int, Done] = {}
        self._next_ticket = 0
        self._ended_by: PackcastError | None = None
        self._jobs, their_jobs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._replies, their_replies = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        timeout = struct.pack("@ll", 0, int(_LOOK_S * 1e6))
        self._replies.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._listener = threading.Thread(
            target=self._listen, name=f"packcast-{name}-helpers", daemon=True
        )
        try:
            with their_jobs, their_replies:
                self._start_helpers(count, their_jobs, their_replies)
            self._listener.start()
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise TransferError(
                f"this host cannot start a helper process: {error.strerror}"
            ) from error

    def submit(self, job: Job, memory: memoryview, done: Done) -> None:
        """Do the job in `memory`, which is exactly its bytes, and call `done`.

        Blocks while the helpers have enough to do. Raises what ended them.
        """
        if job.nbytes <= _SMALL_NBYTES:
            done(perform(job, memory))
            return
        with self._changed:
            if len(self._pending) >= self._limit:
                self._changed.wait_for(lambda: self._ended_by or len(self._pending) <= self._low)
            if self._ended_by:
                raise self._ended_by
            ticket = self._next_ticket
            self._next_ticket += 1
            self._pending[ticket] = done
        if not self._send(ticket, job, memory) and self._take(ticket):
            done(perform(job, memory))

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

    def _start_helpers(self, count: int, jobs: socket.socket, replies: socket.socket) -> None:
        # Blocked in the helpers from their first moment on, until they ignore them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
        try:
            for _ in range(count):
                self._helpers.append(_start(jobs, replies, self._arena))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _send(self, ticket: int, job: Job, memory: memoryview) -> bool:
        """False if no message can carry it."""
        begin = address_of(memory) - self._arena.address
        message, descriptors = pack_job(ticket, begin, job)
        if len(message) > MAX_MESSAGE_NBYTES or len(descriptors) > MAX_DESCRIPTORS:
            return False
        try:
            socket.send_fds(self._jobs, [message], descriptors)
        except OSError as error:
            # Descriptors under way count against a limit that all processes of a user share.
            if error.errno == errno.ETOOMANYREFS:
                return False
            self._fail(self._obituary() or TransferError("the helper processes are gone"))
        return True

    def _take(self, ticket: int) -> Done | None:
        with self._changed:
            done = self._pending.pop(ticket, None)
            if len(self._pending) == self._low:
                self._changed.notify_all()
            return done

    def _listen(self) -> None:
        look_at = time.monotonic() + _LOOK_S
        while self._ended_by is None:
            with suppress(BlockingIOError):
                message = self._replies.recv(MAX_MESSAGE_NBYTES)
                if not message:
                    look_at = 0.0
                else:
                    ticket, outcome = unpack_outcome(message)
                    done = self._take(ticket)
                    if done:
                        done(outcome)
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + _LOOK_S
                obituary = self._obituary()
                if obituary:
                    self._fail(obituary)

    def _obituary(self) -> TransferError | None:
        for helper in self._helpers:
            code = helper.poll()
            if code is not None:
                if code >= 0:
                    return TransferError(f"helper process {helper.pid} ended with code {code}")
                return TransferError(
                    f"helper process {helper.pid} was killed by {signal.Signals(-code).name}",
                    hint="the kernel's log tells whether the host ran out of memory",
                )
        return None

    def _fail(self, error: PackcastError) -> None:
        """The first call decides; what is under way is over with `error`."""
        with self._changed:
            if self._ended_by:
                return
            self._ended_by = error
            pending = list(self._pending.values())
            self._pending.clear()
            self._changed.notify_all()
        for done in pending:
            done(Outcome(error=error))


Hands = ThreadHands | ProcessHands


def join_all(threads: list[threading.Thread], limit_s: float) -> bool:
    """Wait for the threads to end, `limit_s` for all of them together; True if they did."""
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


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


def _start(jobs: socket.socket, replies: socket.socket, arena: Arena) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # where an editable install may have no path for it
    # A Path in it is no text, and nothing to the parent's own imports either.
    path = [entry for entry in sys.path if isinstance(entry, str)]
    path += [] if root in path else [root]
    inherited = (jobs.fileno(), replies.fileno(), arena.fd)
    return subprocess.Popen(
        [*_PYTHON, _PROGRAM, json.dumps(path), str(os.getpid()), *map(str, inherited)],
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
