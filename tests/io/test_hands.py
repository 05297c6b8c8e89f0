"""Helper processes' lives: they end with their parent, and a transfer ends with any of them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from packcast.io.hands import Hands, Order, ProcessHands, ThreadHands

from packcast.errors import TransferError
from packcast.io import hand
from packcast.io import hands as hands_module
from packcast.io.pinned import Arena
from packcast.io.work import Failure, Job, Outcome, Span, Task
from packcast.packed.plan import BLOCK
from tests.helpers.commands import eventually
from tests.helpers.processes import helpers_of, num_descriptors
from tests.helpers.waiting import Waiter
from tests.io.sinks import digests_of

NBYTES = 2 * BLOCK


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(NBYTES, is_pinned=False)
    arena.view[:] = random.Random(3).randbytes(NBYTES)
    yield arena
    arena.close(is_idle=True)


def check(arena: Arena) -> Job:
    return Job(Task.CHECK, NBYTES, (), digests_of(arena.view))


def test_helpers_are_waited_for_until_all_are_there_and_no_longer_than_that(arena: Arena) -> None:
    hands = ProcessHands(arena, 2, "test", threads_each=1)
    hands.await_ready(20)
    for helper in helpers_of(os.getpid()):
        assert "memfd:packcast" in Path(f"/proc/{helper}/maps").read_text()
        os.kill(helper, signal.SIGSTOP)
    hands.await_ready(20)
    hands.close()
    hands.await_ready(20)


def test_a_helper_that_does_not_come_is_not_waited_for_too_long(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hands_module, "_PROGRAM", "import time; time.sleep(20)")
    hands = ProcessHands(arena, 1, "test")
    hands.await_ready(0.1)
    monkeypatch.setattr(hands_module, "_PROGRAM", "raise SystemExit(7)")
    others = ProcessHands(arena, 1, "test")
    others.await_ready(20)
    answers: SimpleQueue[Outcome] = SimpleQueue()
    others.submit([(check(arena), arena.view, answers.put)])
    assert "ended with code 7" in str(answers.get(timeout=20).error)
    for each in (hands, others):
        each.close()


def test_closing_ends_the_helpers_and_leaves_no_descriptor(arena: Arena) -> None:
    num_before = num_descriptors()
    hands = ProcessHands(arena, 3, "test", threads_each=1)
    answers: SimpleQueue[Outcome] = SimpleQueue()
    for _ in range(20):
        hands.submit([(check(arena), arena.view, answers.put)])
    assert all(answers.get(timeout=20).good for _ in range(20))
    assert len(helpers_of(os.getpid())) == 3
    hands.close()
    assert helpers_of(os.getpid()) == []
    assert num_descriptors() == num_before
    assert not [t.name for t in threading.enumerate() if t.name.startswith("packcast-test")]


def test_a_killed_helper_is_named_and_ends_what_is_under_way(arena: Arena) -> None:
    hands = ProcessHands(arena, 2, "test", threads_each=1)
    answers: SimpleQueue[Outcome] = SimpleQueue()
    for helper in helpers_of(os.getpid()):
        os.kill(helper, signal.SIGSTOP)
    hands.submit([(check(arena), arena.view, answers.put)])
    victim = helpers_of(os.getpid())[0]
    os.kill(victim, signal.SIGKILL)
    error = answers.get(timeout=20).error
    assert isinstance(error, TransferError)
    assert error.message == f"helper process {victim} was killed by SIGKILL"
    assert "memory" in str(error.hint)
    hands.submit([(check(arena), arena.view, answers.put)])
    assert answers.get(timeout=20).error is error
    hands.close()  # the other one is stopped, and killed
    assert helpers_of(os.getpid()) == []


def with_helpers_program(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Helpers that do `change` first, some statements about `hand`."""
    program = hands_module._PROGRAM
    start = program.index("from packcast")
    changed = f"{program[:start]}import os, packcast.io.hand as hand; {change}; hand.main()"
    monkeypatch.setattr(hands_module, "_PROGRAM", changed)


def test_a_helper_is_noticed_also_if_only_one_of_its_threads_dies(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_helpers_program(monkeypatch, "hand._Batch.do = None")
    hands = ProcessHands(arena, 4, "test")
    answers: SimpleQueue[Outcome] = SimpleQueue()
    hands.submit([(check(arena), arena.view, answers.put)])
    assert "ended with code 1" in str(answers.get(timeout=20).error)
    hands.close()


def test_a_file_that_cannot_be_closed_is_a_failed_write(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, which writes what it was given only then."""
    fail = "close = os.close; os.close = lambda fd: [close(fd), os.open('/dev/full/x', 0)]"
    with_helpers_program(monkeypatch, fail)
    hands = ProcessHands(arena, 2, "test")
    answers: SimpleQueue[Outcome] = SimpleQueue()
    with (tmp_path / "out").open("wb") as file:
        span = Span(file.fileno(), 5, 0, NBYTES)
        job = Job(Task.WRITE, NBYTES, (span,), digests_of(arena.view))
        hands.submit([(job, arena.view, answers.put), (check(arena), arena.view, answers.put)])
        outcomes = [answers.get(timeout=20) for _ in range(2)]
    assert [outcome.failure for outcome in outcomes] == [Failure(0, 5, errno.ENOTDIR), None]
    assert [outcome.good for outcome in outcomes] == [False, True]
    hands.close()


def test_a_signal_without_a_name_is_told_by_its_number(arena: Arena) -> None:
    hands = ProcessHands(arena, 1, "test")
    (helper,) = helpers_of(os.getpid())
    os.kill(helper, signal.SIGRTMIN + 6)
    answers: SimpleQueue[Outcome] = SimpleQueue()
    hands.submit([(check(arena), arena.view, answers.put)])
    error = str(answers.get(timeout=20).error)
    assert error == f"helper process {helper} was killed by signal {signal.SIGRTMIN + 6}"
    hands.close()


def test_a_message_that_the_socket_does_not_take_is_done_in_smaller_ones(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    hands = ProcessHands(arena, 2, "test")
    real = socket.send_fds

    def small(to: socket.socket, messages: list[bytes], *more: Any) -> int:
        if len(messages[0]) > 150:
            raise OSError(errno.EMSGSIZE, "too long")
        return real(to, messages, *more)

    monkeypatch.setattr(socket, "send_fds", small)
    answers: SimpleQueue[Outcome] = SimpleQueue()
    hands.submit([(check(arena), arena.view, answers.put)] * 7)
    assert all(answers.get(timeout=20).good for _ in range(7))
    hands.close()


def test_who_waits_for_busy_helpers_is_woken_when_it_is_over(arena: Arena) -> None:
    hands = ProcessHands(arena, 1, "test")
    for helper in helpers_of(os.getpid()):
        os.kill(helper, signal.SIGSTOP)
    answers: SimpleQueue[Outcome] = SimpleQueue()
    for _ in range(2):
        hands.submit([(check(arena), arena.view, answers.put)])
    waiting = Waiter(lambda: hands.submit([(check(arena), arena.view, answers.put)]))
    assert waiting.waits()
    hands.close()
    waiting.result()
    errors = [answers.get(timeout=20).error for _ in range(3)]
    assert [str(error) for error in errors] == ["the transfer is over"] * 3


def test_an_interrupt_at_the_terminal_does_not_reach_the_helpers(arena: Arena) -> None:
    hands = ProcessHands(arena, 2, "test", threads_each=1)
    answers: SimpleQueue[Outcome] = SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for helper in helpers_of(os.getpid()):  # from their first moment on
            os.kill(helper, number)
    for _ in range(10):
        hands.submit([(check(arena), arena.view, answers.put)])
    assert all(answers.get(timeout=20).good for _ in range(10))
    hands.close()


def test_a_thread_that_is_closed_drops_what_is_queued(arena: Arena) -> None:
    hands = ThreadHands(1, "test")
    begun, go_on = threading.Event(), threading.Event()
    answers: SimpleQueue[Outcome] = SimpleQueue()

    def hold(outcome: Outcome) -> None:
        begun.set()
        go_on.wait(20)

    hands.submit([(check(arena), arena.view, hold)])
    hands.submit([(check(arena), arena.view, answers.put)])
    assert begun.wait(20)
    closing = Waiter(hands.close)
    assert closing.waits()
    go_on.set()
    closing.result()
    assert str(answers.get(timeout=20).error) == "the transfer is over"


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_jobs_that_come_after_the_end_are_refused_and_not_forgotten(
    arena: Arena, kind: str
) -> None:
    hands: Hands = ThreadHands(2, "test") if kind == "threads" else ProcessHands(arena, 1, "test")
    hands.close()
    answers: SimpleQueue[Outcome] = SimpleQueue()
    hands.submit([(check(arena), arena.view, answers.put)] * 3)
    assert [str(answers.get_nowait().error) for _ in range(3)] == ["the transfer is over"] * 3


def test_a_search_path_with_things_that_are_no_text_is_the_helpers_too(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: list[Any] = [Path("/nowhere"), *sys.path]
    monkeypatch.setattr(sys, "path", path)
    hands = ProcessHands(arena, 1, "test")
    answers: SimpleQueue[Outcome] = SimpleQueue()
    hands.submit([(check(arena), arena.view, answers.put)])
    assert answers.get(timeout=20).good
    hands.close()


PARENT = """
import os, signal, sys, time
from packcast.io.pinned import Arena
from packcast.io.hands import ProcessHands
from packcast.io.work import Job, Task
arena = Arena(1 << 20, is_pinned=False)
hands = ProcessHands(arena, 3, "test", threads_each=1)
if "fork" in sys.argv and os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: both processes write
    time.sleep(20)  # with our ends of the sockets
os.write(1, b"started\\n")
sys.stdin.read(1)
if "exit" in sys.argv: os._exit(3)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.chaos
@pytest.mark.parametrize("how", ["exit", "kill", "fork"])
def test_no_helper_outlives_its_parent(how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        lines = [parent.stdout.readline()]
        if how == "fork":
            lines.append(parent.stdout.readline())
        assert "started\n" in lines
        helpers = helpers_of(parent.pid)
        assert len(helpers) == 3
        parent.stdin.write("x")
        parent.stdin.flush()
        assert parent.wait(20) == (3 if how == "exit" else -9)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers), "their end")
        for line in lines:
            if line != "started\n":
                os.kill(int(line), signal.SIGKILL)


def test_a_helper_has_closed_a_jobs_files_when_it_answers(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program, here: whoever hears of the last job may remove the files at once."""
    num_open: list[int] = []
    made = contextlib.ExitStack()

    class Watched(socket.socket):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.enter_context(self)

        def send(self, *args: Any) -> int:
            num_open.append(num_descriptors())
            return super().send(*args)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answers, replies = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, answers, made:
        with (tmp_path / "out").open("wb") as file:
            span = Span(file.fileno(), 0, 0, NBYTES)
            job = Job(Task.WRITE, NBYTES, (span,), digests_of(arena.view))
            message, descriptors = hand.pack_jobs(7, [(0, job)])
            socket.send_fds(ours, [message], descriptors)
        ours.shutdown(socket.SHUT_WR)
        given = (os.getppid(), 1, theirs.detach(), replies.detach(), arena.fd)
        monkeypatch.setattr(hand, "PARENTS_SIGNALS", ())
        monkeypatch.setattr(sys, "argv", ["-c", *map(str, given)])
        monkeypatch.setattr(socket, "socket", Watched)
        num_before = num_descriptors()
        hand.main()
        assert hand.unpack_outcomes(answers.recv(1000)) == (hand.HELLO, [])
        ticket, (outcome,) = hand.unpack_outcomes(answers.recv(1000))
    assert (ticket, outcome.good) == (7, True)
    assert num_open == [num_before + 1] * 2  # its mapping of the memory
    assert (tmp_path / "out").read_bytes() == bytes(arena.view)


def test_many_jobs_of_one_call_are_each_told_once_by_helpers_of_several_threads(
    arena: Arena, tmp_path: Path
) -> None:
    """Whole and small ones, of more files than one message carries."""
    memory, dice = bytes(arena.view), random.Random(8)
    hands = ProcessHands(arena, 5, "test", threads_each=2)
    assert len(helpers_of(os.getpid())) == 3
    answers: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
    with contextlib.ExitStack() as opened:
        orders: list[Order] = []
        for i in range(hand.MAX_DESCRIPTORS + 50):
            nbytes = dice.choice([1000, 70_000])
            begin = dice.randrange(NBYTES - nbytes)
            (tmp_path / str(i)).write_bytes(memory[begin : begin + nbytes])
            fd = opened.enter_context((tmp_path / str(i)).open("rb")).fileno()
            view = arena.view[begin : begin + nbytes]
            job = Job(Task.COMPARE, nbytes, (Span(fd, 0, 0, nbytes),), digests_of(view))
            orders.append((job, view, lambda outcome, i=i: answers.put((i, outcome))))
        hands.submit(orders)
        told = [answers.get(timeout=20) for _ in orders]
    assert sorted(i for i, _ in told) == list(range(len(orders)))
    assert all(outcome.good and not outcome.differences for _, outcome in told)
    hands.close()
    assert answers.empty()


def test_nothing_is_said_by_helpers_and_they_import_no_torch(arena: Arena) -> None:
    hands = ProcessHands(arena, 1, "test")
    (helper,) = helpers_of(os.getpid())
    answers: SimpleQueue[Outcome] = SimpleQueue()
    hands.submit([(check(arena), arena.view, answers.put)])
    assert answers.get(timeout=20).good
    assert "torch" not in Path(f"/proc/{helper}/maps").read_text()
    for number in (0, 1, 2):
        assert os.readlink(f"/proc/{helper}/fd/{number}") == os.devnull
    hands.close()
