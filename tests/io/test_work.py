"""Jobs: reading, checking, writing and comparing, by threads and by helper processes alike."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import pytest
from packcast.io.hands import Hands, ProcessHands, ThreadHands

from packcast.errors import PackcastError
from packcast.io import hand, work
from packcast.io.pinned import Arena
from packcast.io.work import Failure, Job, Outcome, Span, Task, perform
from packcast.packed.plan import BLOCK
from tests.io.sinks import digests_of

NBYTES = 3 * BLOCK + 12_345
PLACE = 5000  # where the job lies in the arena: nowhere in particular


class Crew:
    """Hands, memory they can reach, and their answers waited for."""

    def __init__(self, hands: Hands, memory: memoryview) -> None:
        self.hands = hands
        self.memory = memory
        self._answers: SimpleQueue[Outcome] = SimpleQueue()

    def do(self, job: Job) -> Outcome:
        self.hands.submit([(job, self.memory[: job.nbytes], self._answers.put)])
        return self._answers.get(timeout=20)


@pytest.fixture(scope="module", params=["threads", "processes"])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    arena = Arena(PLACE + NBYTES, is_pinned=False)
    is_threads = request.param == "threads"
    hands = ThreadHands(2, "test") if is_threads else ProcessHands(arena, 2, "test")
    yield Crew(hands, arena.view[PLACE : PLACE + NBYTES])
    hands.close()
    arena.close(is_idle=True)


@pytest.fixture
def data(crew: Crew) -> bytes:
    """Random bytes; the crew's memory holds something else."""
    crew.memory[:] = b"\xa5" * NBYTES
    return random.Random(1).randbytes(NBYTES)


def opened(path: Path, content: bytes, flags: int = os.O_RDWR) -> int:
    path.write_bytes(content)
    return os.open(path, flags)


def scattered(fds: list[int], nbytes: int, seed: int) -> list[Span]:
    """Spans over all of a job's memory, from anywhere in several files."""
    dice = random.Random(seed)
    cuts = sorted({0, nbytes, BLOCK, *(dice.randrange(nbytes) for _ in range(40))})
    spans = []
    for begin, end in pairwise(cuts):
        spans.append(Span(dice.choice(fds), dice.randrange(1000), begin, end - begin))
    return spans


def test_reading_gathers_spans_of_many_files_and_finds_the_digests(
    crew: Crew, data: bytes, tmp_path: Path
) -> None:
    contents = [random.Random(i).randbytes(NBYTES + 1000) for i in range(3)]
    fds = [opened(tmp_path / str(i), content) for i, content in enumerate(contents)]
    spans = scattered(fds, NBYTES, seed=5)
    outcome = crew.do(Job(Task.READ, NBYTES, tuple(spans)))
    expected = b"".join(
        contents[fds.index(span.fd)][span.offset : span.offset + span.nbytes] for span in spans
    )
    assert bytes(crew.memory) == expected
    assert outcome.good
    assert outcome.digests == digests_of(expected)
    assert outcome.seconds > 0
    list(map(os.close, fds))


def test_reading_leaves_what_is_in_no_span_and_digests_it(
    crew: Crew, data: bytes, tmp_path: Path
) -> None:
    fd = opened(tmp_path / "f", data)
    crew.memory[:100] = data[:100]
    outcome = crew.do(Job(Task.READ, NBYTES, (Span(fd, 100, 100, NBYTES - 100),)))
    assert bytes(crew.memory) == data
    assert outcome.digests == digests_of(data)
    os.close(fd)


def test_a_file_that_ends_early_is_told_with_the_byte(
    crew: Crew, data: bytes, tmp_path: Path
) -> None:
    fd = opened(tmp_path / "f", data[: 2 * BLOCK + 77])
    spans = (Span(fd, 0, 0, 1000), Span(fd, 1000, 1000, NBYTES - 1000))
    outcome = crew.do(Job(Task.READ, NBYTES, spans))
    assert outcome.failure == Failure(1, 2 * BLOCK + 77, 0)
    assert not outcome.good
    os.close(fd)


def test_a_system_call_that_fails_is_told_with_its_number(
    crew: Crew, data: bytes, tmp_path: Path
) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    outcome = crew.do(Job(Task.READ, NBYTES, (Span(folder, 0, 0, NBYTES),)))
    assert outcome.failure == Failure(0, 0, errno.EISDIR)
    assert outcome.failure.error.strerror == os.strerror(errno.EISDIR)
    crew.memory[:] = data
    unwritable = opened(tmp_path / "f", b"", os.O_RDONLY)
    span = Span(unwritable, 0, 0, NBYTES)
    outcome = crew.do(Job(Task.WRITE, NBYTES, (span,), digests_of(data)))
    assert outcome.failure == Failure(0, 0, errno.EBADF)
    os.close(folder)
    os.close(unwritable)


@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("task", [Task.CHECK, Task.WRITE, Task.COMPARE])
def test_a_damaged_block_is_found_and_nothing_is_done_with_it(
    crew: Crew, data: bytes, tmp_path: Path, task: Task, block: int
) -> None:
    fd = opened(tmp_path / "f", b"\x11" * NBYTES)
    crew.memory[:] = data
    crew.memory[min((block + 1) * BLOCK, NBYTES) - 1] ^= 1
    outcome = crew.do(Job(task, NBYTES, (Span(fd, 0, 0, NBYTES),), digests_of(data)))
    assert outcome.damaged_block == block
    assert not outcome.good
    is_written = task is Task.WRITE
    written = data[: block * BLOCK] if is_written else b""
    assert (tmp_path / "f").read_bytes() == written + b"\x11" * (NBYTES - len(written))
    os.close(fd)


def test_checking_what_is_whole_is_good(crew: Crew, data: bytes) -> None:
    crew.memory[:] = data
    assert crew.do(Job(Task.CHECK, NBYTES, (), digests_of(data))).good
    # And so is less than all of it, from the first byte on.
    nbytes = BLOCK + 1
    assert crew.do(Job(Task.CHECK, nbytes, (), digests_of(data[:nbytes]))).good


def test_writing_puts_each_span_where_it_belongs(crew: Crew, data: bytes, tmp_path: Path) -> None:
    fds = [opened(tmp_path / str(i), b"") for i in range(3)]
    crew.memory[:] = data
    cut = BLOCK + 4321
    spans = (Span(fds[1], 10, 0, cut), Span(fds[2], 7, cut, NBYTES - cut))
    assert crew.do(Job(Task.WRITE, NBYTES, spans, digests_of(data))).good
    assert (tmp_path / "0").read_bytes() == b""
    assert (tmp_path / "1").read_bytes() == bytes(10) + data[:cut]
    assert (tmp_path / "2").read_bytes() == bytes(7) + data[cut:]
    list(map(os.close, fds))


def test_the_disk_begins_with_what_is_written_and_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(9).randbytes(NBYTES)
    fds = [opened(tmp_path / str(i), b"") for i in range(2)]
    spans = (Span(fds[0], 10, 0, BLOCK), Span(fds[1], 0, BLOCK, NBYTES - BLOCK))
    job = Job(Task.WRITE, NBYTES, spans, digests_of(data))
    begun: list[tuple[int, int, int]] = []

    def start(*given: int) -> None:
        begun.append((given[0], given[1], given[2]))
        raise OSError(errno.ESPIPE, "not everything can")

    monkeypatch.setattr(work, "start_writeback", start)
    assert perform(job, memoryview(bytearray(data))).good
    assert begun == [(span.fd, span.offset, span.nbytes) for span in spans]
    damaged = bytearray(data)
    damaged[-1] ^= 1
    assert not perform(job, memoryview(damaged)).good
    assert len(begun) == 2
    list(map(os.close, fds))


def test_comparing_finds_the_first_byte_that_differs_in_each_span(
    crew: Crew, data: bytes, tmp_path: Path
) -> None:
    here = bytearray(data)
    cuts = [0, 1000, 2 * BLOCK + 5, 3 * BLOCK, NBYTES]
    for at in (999, 2 * BLOCK + 4, 3 * BLOCK, 3 * BLOCK + 1):
        here[at] ^= 0x80
    fd = opened(tmp_path / "f", bytes(here))
    crew.memory[:] = data
    spans = tuple(Span(fd, begin, begin, end - begin) for begin, end in pairwise(cuts))
    outcome = crew.do(Job(Task.COMPARE, NBYTES, spans, digests_of(data)))
    assert outcome.good
    assert dict(outcome.differences) == {0: 999, 1: 2 * BLOCK + 4 - 1000, 3: 0}
    os.close(fd)


def test_a_job_of_more_spans_than_a_message_holds_is_done_all_the_same(
    crew: Crew, data: bytes, tmp_path: Path
) -> None:
    fd = opened(tmp_path / "f", data)
    step = 700
    spans = tuple(Span(fd, at, at, min(step, NBYTES - at)) for at in range(0, NBYTES, step))
    message, _ = hand.pack_jobs(0, [(0, Job(Task.READ, NBYTES, spans))])
    assert len(message) > hand.MAX_MESSAGE_NBYTES
    assert crew.do(Job(Task.READ, NBYTES, spans)).digests == digests_of(data)
    assert bytes(crew.memory) == data
    os.close(fd)


def test_a_bug_in_a_job_is_an_error_and_the_hands_go_on(
    crew: Crew, data: bytes, tmp_path: Path
) -> None:
    fd = opened(tmp_path / "f", data)
    too_far = Span(fd, 1 << 63, 0, NBYTES)  # no offset that Python takes
    outcome = crew.do(Job(Task.READ, NBYTES, (too_far,)))
    assert isinstance(outcome.error, PackcastError)
    assert "OverflowError" in outcome.error.message
    assert crew.do(Job(Task.READ, NBYTES, (Span(fd, 0, 0, NBYTES),))).good
    os.close(fd)


def test_jobs_and_their_outcomes_survive_the_way_to_a_helper_and_back() -> None:
    jobs = [
        (123, Job(Task.COMPARE, 99, (Span(7, 1 << 40, 0, 33), Span(9, 5, 40, 59)), b"d" * 16)),
        (1 << 50, Job(Task.READ, 10, (Span(9, 0, 0, 10),))),
        (0, Job(Task.CHECK, 10, (), b"e" * 32)),
    ]
    message, descriptors = hand.pack_jobs(1 << 50, jobs)
    assert descriptors == [7, 9]
    assert hand.unpack_jobs(message, descriptors) == (1 << 50, jobs)
    outcomes = [
        Outcome(1.5, b"x" * 32),
        Outcome(0.25, damaged_block=3),
        Outcome(0.25, failure=Failure(2, 1 << 41, errno.ENOSPC)),
        Outcome(0.0, differences=((0, 17), (5, 1 << 40))),
        Outcome(2.5, b"y" * 16),
    ]
    assert hand.unpack_outcomes(hand.pack_outcomes(6, outcomes)) == (6, outcomes)
