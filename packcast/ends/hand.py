"""A helper process: takes jobs from a socket, does them in shared memory, answers on another.

Its program and the messages that both sides speak. No torch here: it has to start at once.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Sequence

from packcast.ends.work import Failure, Job, Outcome, Span, Task, perform
from packcast.errors import PackcastError

# Well within what one message of a local socket may be by Linux's default (net.core.wmem_default).
MAX_MESSAGE_NBYTES = 64 * 1024
MAX_DESCRIPTORS = 200  # the kernel's limit is 253 (SCM_MAX_FD)

# A terminal's Ctrl-C and a launcher's SIGTERM are for the parent, which knows what is to be told
# to whom; when it goes, its helpers do.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_BATCH = struct.Struct("<QI4x")  # ticket, jobs or outcomes
_JOB = struct.Struct("<QQIIB7x")  # where in memory, nbytes, spans, bytes of digests, task
_SPAN = struct.Struct("<QQQI4x")  # offset, at, nbytes, which of the descriptors
# seconds, bytes that follow, damaged block, failed span, errno, its offset, differences
_OUTCOME = struct.Struct("<dIqiiQI")
_DIFFERENCE = struct.Struct("<QI4x")  # the byte, the span
_NONE = -1
HELLO = (1 << 64) - 1  # in the place of a ticket: the helper is ready
_BUG = -2  # in the place of the damaged block: the rest is a sentence
_MAX_SENTENCE_NBYTES = 400  # those of a batch have to fit into one message

# A parent that is gone is noticed by end of file, unless a child that it forked meanwhile still
# holds its end of the socket: hence a look every second.
_PARENT_CHECK_S = 1


def pack_jobs(ticket: int, jobs: Sequence[tuple[int, Job]]) -> tuple[bytes, list[int]]:
    """The message for jobs and where their memory begins, and the descriptors it travels with."""
    which: dict[int, int] = {}
    message = bytearray(_BATCH.pack(ticket, len(jobs)))
    for begin, job in jobs:
        message += _JOB.pack(begin, job.nbytes, len(job.spans), len(job.digests), job.task)
        for span in job.spans:
            index = which.setdefault(span.fd, len(which))
            message += _SPAN.pack(span.offset, span.at, span.nbytes, index)
        message += job.digests
    return bytes(message), list(which)


def unpack_jobs(message: bytes, descriptors: Sequence[int]) -> tuple[int, list[tuple[int, Job]]]:
    """What `pack_jobs` was given, with the descriptors as they are called here."""
    ticket, num_jobs = _BATCH.unpack_from(message)
    jobs, at = [], _BATCH.size
    for _ in range(num_jobs):
        begin, nbytes, num_spans, digest_nbytes, task = _JOB.unpack_from(message, at)
        at += _JOB.size
        end = at + num_spans * _SPAN.size
        spans = tuple(
            Span(descriptors[which], offset, span_at, span_nbytes)
            for offset, span_at, span_nbytes, which in _SPAN.iter_unpack(message[at:end])
        )
        at = end + digest_nbytes
        jobs.append((begin, Job(Task(task), nbytes, spans, message[end:at])))
    return ticket, jobs


def pack_outcomes(ticket: int, outcomes: Sequence[Outcome]) -> bytes:
    """The answer to a batch of jobs."""
    message = bytearray(_BATCH.pack(ticket, len(outcomes)))
    for outcome in outcomes:
        failure = outcome.failure or Failure(_NONE, 0, 0)
        damaged, rest = outcome.damaged_block, outcome.digests
        if outcome.error is not None:
            damaged, rest = _BUG, outcome.error.message.encode()[:_MAX_SENTENCE_NBYTES]
        message += _OUTCOME.pack(
            outcome.seconds,
            len(rest),
            _NONE if damaged is None else damaged,
            failure.span,
            failure.errno,
            failure.offset,
            len(outcome.differences),
        )
        for span, where in outcome.differences:
            message += _DIFFERENCE.pack(where, span)
        message += rest
    return bytes(message)


def unpack_outcomes(message: bytes) -> tuple[int, list[Outcome]]:
    """The batch's ticket, and what came of its jobs."""
    ticket, num_jobs = _BATCH.unpack_from(message)
    outcomes, at = [], _BATCH.size
    for _ in range(num_jobs):
        head = _OUTCOME.unpack_from(message, at)
        at += _OUTCOME.size
        end = at + head[-1] * _DIFFERENCE.size
        found = tuple((span, where) for where, span in _DIFFERENCE.iter_unpack(message[at:end]))
        at = end + head[1]
        outcomes.append(_outcome_of(head, found, message[end:at]))
    return ticket, outcomes


def _outcome_of(
    head: tuple[float, int, int, int, int, int, int],
    differences: tuple[tuple[int, int], ...],
    rest: bytes,
) -> Outcome:
    seconds, _, damaged, span, code, offset, _ = head
    if damaged == _BUG:
        return Outcome(seconds, error=PackcastError(rest.decode(errors="replace")))
    return Outcome(
        seconds,
        rest,
        None if damaged == _NONE else damaged,
        None if span == _NONE else Failure(span, offset, code),
        differences,
    )


class _Batch:
    """The jobs of one message, shared by the helper's threads; the last one done answers."""

    def __init__(self, message: bytes, descriptors: Sequence[int]) -> None:
        self._descriptors = descriptors
        self.ticket, self.jobs = unpack_jobs(message, descriptors)
        self._outcomes = [Outcome()] * len(self.jobs)
        self._num_left = len(self.jobs)
        self._lock = threading.Lock()

    def do(self, index: int, memory: memoryview) -> bytes | None:
        """Do one of the jobs; the answer to all, if it was the last."""
        begin, job = self.jobs[index]
        try:
            outcome = perform(job, memory[begin : begin + job.nbytes])
        except Exception as error:
            outcome = Outcome(error=PackcastError(f"a helper process failed: {error!r}"))
        with self._lock:
            self._outcomes[index] = outcome
            self._num_left -= 1
            if self._num_left:
                return None
        self._close_files()
        return pack_outcomes(self.ticket, self._outcomes)

    def _close_files(self) -> None:
        """Before the answer: NFS keeps a removed file's name for as long as anybody has it open,
        and who hears of the last job may remove what was written at once."""
        for descriptor in self._descriptors:
            try:
                os.close(descriptor)
            except OSError as error:  # NFS again, which writes now and finds that it cannot
                for index, (_, job) in enumerate(self.jobs):
                    if any(span.fd == descriptor for span in job.spans):
                        failure = Failure(0, job.spans[0].offset, error.errno or 0)
                        self._outcomes[index] = Outcome(failure=failure)


class _Helper:
    """Threads that take jobs one by one from a message, and the next message when it has none."""

    def __init__(self, parent: int, jobs_fd: int, replies_fd: int, memory_fd: int) -> None:
        self._parent = parent
        # Every page now: faults in the middle of a read would make its first round three times
        # as slow.
        mapped = mmap.MAP_SHARED | mmap.MAP_POPULATE
        nbytes = os.fstat(memory_fd).st_size
        self._memory = memoryview(mmap.mmap(memory_fd, nbytes, flags=mapped))
        self._jobs = socket.socket(fileno=jobs_fd)
        self._replies = socket.socket(fileno=replies_fd)
        timeout = struct.pack("@ll", _PARENT_CHECK_S, 0)
        self._jobs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._waiting: deque[tuple[_Batch, int]] = deque()
        self._lock = threading.Lock()
        self._replies.send(pack_outcomes(HELLO, ()))

    def work(self) -> None:
        """Until the parent has gone or wants no more; several threads at once."""
        while True:
            with self._lock:
                if not self._waiting and not self._receive():
                    return
                batch, index = self._waiting.popleft()
            answer = batch.do(index, self._memory)
            if answer is not None:
                try:
                    self._replies.send(answer)
                except (BrokenPipeError, ConnectionResetError):  # nobody waits for it any more
                    return

    def _receive(self) -> bool:
        while os.getppid() == self._parent:
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    self._jobs, MAX_MESSAGE_NBYTES, MAX_DESCRIPTORS
                )
            except BlockingIOError:
                continue
            if not message:
                return False
            batch = _Batch(message, descriptors)
            self._waiting.extend((batch, index) for index in range(len(batch.jobs)))
            return True
        return False


def main() -> None:
    """The helper's life: `PARENT_PID THREADS JOBS REPLIES MEMORY`, the last three descriptors."""
    parent, num_threads, *descriptors = map(int, sys.argv[-5:])
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    helper = _Helper(parent, *descriptors)
    for _ in range(num_threads - 1):
        threading.Thread(target=_live, args=(helper,), daemon=True).start()
    _live(helper)


def _live(helper: _Helper) -> None:
    """A thread's life; what ends it otherwise than well ends the process, which is noticed."""
    try:
        helper.work()
    except BaseException:
        os._exit(1)
