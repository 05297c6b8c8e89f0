"""What only the loop in Python can meet."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from packcast.io import threads
from packcast.io.schedule import Span
from packcast.io.work import Failure, FailureKind, Task
from packcast.packed.plan import BLOCK
from tests.io.pools import NBYTES, Bench, Opened, promised, random_bytes


@pytest.fixture(autouse=True)
def _python_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKCAST_POOL", "python")


def test_a_bug_in_a_thread_is_raised_where_the_unit_is_waited_for() -> None:
    bench = Bench(NBYTES, (Span(7, 0, 0, NBYTES),), [0])  # there is no file 7
    pool = bench.start(Task.READ)
    pool.allow(3)
    with pytest.raises(IndexError):
        pool.wait(0, 20)
    assert pool.close(20)


def test_a_write_of_nothing_is_an_error_and_not_forever(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [opened(tmp_path / "f", b"")])
    stopped = promised(bench, random_bytes()).do(Task.WRITE, threads=1)
    assert stopped is not None
    assert stopped.failure == Failure(FailureKind.ERRNO, errno.EIO, 0, 0, 0)


def test_the_disk_begins_with_what_is_written_and_proven(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = [opened(tmp_path / str(i), b"") for i in range(2)]
    spans = (Span(0, 10, 0, BLOCK), Span(1, 0, BLOCK, NBYTES - BLOCK))
    begun: list[tuple[int, int, int]] = []

    def start(fd: int, offset: int, nbytes: int) -> None:
        begun.append((fd, offset, nbytes))
        raise OSError(errno.ESPIPE, "not everything can")

    monkeypatch.setattr(threads, "start_writeback", start)
    assert promised(Bench(NBYTES, spans, fds), random_bytes()).do(Task.WRITE) is None
    first = (fds[0], 10, BLOCK)
    assert sorted(begun)[0] == first
    assert sum(nbytes for *_, nbytes in begun) == NBYTES
