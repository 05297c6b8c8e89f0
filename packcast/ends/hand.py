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
from collections.abc import Sequence

from packcast.ends.work import Failure, Job, Outcome, Span, Task, perform
from packcast.errors import PackcastError

# Well within what one message of a local socket may be by Linux's default (net.core.wmem_default).
MAX_MESSAGE_NBYTES = 64 * 1024
MAX_DESCRIPTORS = 200  # the kernel's limit is 253 (SCM_MAX_FD)

# A terminal's Ctrl-C and a launcher's SIGTERM are for the parent, which knows what is to be told
# to whom; when it goes, its helpers do.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_JOB = struct.Struct("<QQQIB3x")  # ticket, where in memory, nbytes, spans, task
_SPAN = struct.Struct("<QQQI4x")  # offset, at, nbytes, which of the descriptors
# ticket, seconds, damaged block, failed span, errno, its offset, differences
_OUTCOME = struct.Struct("<QdqiiQI4x")
_DIFFERENCE = struct.Struct("<QI4x")  # the byte, the span
_NONE = -1
_BUG = -2  # in the place of the damaged block: the rest is a sentence

# A parent that is gone is noticed by end of file, unless a child that it forked meanwhile still
# holds its end of the socket: hence a look every second.
_PARENT_CHECK_S = 1


def pack_job(ticket: int, begin: int, job: Job) -> tuple[bytes, list[int]]:
    """The message and the descriptors that travel with it; `begin` is the memory's place."""
    descriptors: list[int] = []
    spans = bytearray()
    for span in job.spans:
        if not descriptors or span.fd != descriptors[-1]:
            descriptors.append(span.fd)
        spans += _SPAN.pack(span.offset, span.at, span.nbytes, len(descriptors) - 1)
    head = _JOB.pack(ticket, begin, job.nbytes, len(job.spans), job.task)
    return b"".join((head, spans, job.digests)), descriptors


def unpack_job(message: bytes, descriptors: Sequence[int]) -> tuple[int, int, Job]:
    """What `pack_job` was given, with the descriptors as they are called here."""
    ticket, begin, nbytes, num_spans, task = _JOB.unpack_from(message)
    end = _JOB.size + num_spans * _SPAN.size
    spans = tuple(
        Span(descriptors[which], offset, at, span_nbytes)
        for offset, at, span_nbytes, which in _SPAN.iter_unpack(message[_JOB.size : end])
    )
    return ticket, begin, Job(Task(task), nbytes, spans, message[end:])


def pack_outcome(ticket: int, outcome: Outcome) -> bytes:
    """The answer to a job."""
    failure = outcome.failure or Failure(_NONE, 0, 0)
    damaged, rest = outcome.damaged_block, outcome.digests
    if outcome.error is not None:
        damaged, rest = _BUG, outcome.error.message.encode()[:4096]
    head = _OUTCOME.pack(
        ticket,
        outcome.seconds,
        _NONE if damaged is None else damaged,
        failure.span,
        failure.errno,
        failure.offset,
        len(outcome.differences),
    )
    differences = (_DIFFERENCE.pack(at, span) for span, at in outcome.differences)
    return b"".join((head, *differences, rest))


def unpack_outcome(message: bytes) -> tuple[int, Outcome]:
    """The job's ticket, and what came of it."""
    ticket, seconds, damaged, span, code, offset, num_found = _OUTCOME.unpack_from(message)
    end = _OUTCOME.size + num_found * _DIFFERENCE.size
    if damaged == _BUG:
        return ticket, Outcome(seconds, error=PackcastError(message[end:].decode(errors="replace")))
    if damaged == _NONE and span == _NONE and not num_found:  # nearly always
        return ticket, Outcome(seconds, message[end:])
    return ticket, Outcome(
        seconds,
        message[end:],
        None if damaged == _NONE else damaged,
        None if span == _NONE else Failure(span, offset, code),
        tuple((which, at) for at, which in _DIFFERENCE.iter_unpack(message[_OUTCOME.size : end])),
    )


def main() -> None:
    """The helper's life: `PARENT_PID JOBS REPLIES MEMORY`, the last three open descriptors."""
    parent, jobs_fd, replies_fd, memory_fd = map(int, sys.argv[-4:])
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    memory = memoryview(mmap.mmap(memory_fd, os.fstat(memory_fd).st_size))
    jobs, replies = socket.socket(fileno=jobs_fd), socket.socket(fileno=replies_fd)
    jobs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _PARENT_CHECK_S, 0))
    while os.getppid() == parent:
        try:
            message, descriptors, _, _ = socket.recv_fds(jobs, MAX_MESSAGE_NBYTES, MAX_DESCRIPTORS)
        except BlockingIOError:
            continue
        if not message:
            return
        try:
            answer = _answer(message, descriptors, memory)
        finally:
            # Before the answer: NFS keeps a removed file's name for as long as anybody has it
            # open, and who hears of the last job may remove what was written at once.
            for descriptor in descriptors:
                os.close(descriptor)
        try:
            replies.send(answer)
        except OSError:  # nobody waits for it any more
            return


def _answer(message: bytes, descriptors: Sequence[int], memory: memoryview) -> bytes:
    ticket, begin, job = unpack_job(message, descriptors)
    try:
        outcome = perform(job, memory[begin : begin + job.nbytes])
    except Exception as error:
        outcome = Outcome(error=PackcastError(f"a helper process failed: {error!r}"))
    return pack_outcome(ticket, outcome)
