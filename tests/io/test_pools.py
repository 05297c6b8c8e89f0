"""I/O threads at work on a schedule, of both kinds: what they do, what they say, when they end."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from packcast.errors import TransferError
from packcast.io.schedule import IN_MEMORY, Span
from packcast.io.work import Failure, FailureKind, PoolStopped, Task
from packcast.packed.plan import BLOCK, DIGEST_NBYTES
from tests.helpers.commands import eventually
from tests.helpers.forge import REPOSITORY
from tests.helpers.native import built
from tests.helpers.processes import num_descriptors
from tests.helpers.waiting import Waiter
from tests.io.conftest import use_native
from tests.io.pools import (
    NBYTES,
    UNIT,
    Bench,
    Gate,
    Opened,
    address,
    no_thread_left,
    promised,
    random_bytes,
)
from tests.io.sinks import digests_of

pytestmark = pytest.mark.usefixtures("pool")

Hold = Callable[[int], Gate]


def scattered(num_files: int, nbytes: int, seed: int) -> list[Span]:
    """Spans over all of the memory, from anywhere in several files."""
    dice = random.Random(seed)
    cuts = sorted({0, nbytes, BLOCK, *(dice.randrange(nbytes) for _ in range(40))})
    return [
        Span(dice.randrange(num_files), dice.randrange(1000), begin, end - begin)
        for begin, end in pairwise(cuts)
    ]


def test_reading_gathers_spans_of_many_files_and_finds_the_digests(
    opened: Opened, tmp_path: Path
) -> None:
    contents = [random_bytes(i, NBYTES + 1000) for i in range(3)]
    fds = [opened(tmp_path / str(i), content) for i, content in enumerate(contents)]
    bench = Bench(NBYTES, scattered(3, NBYTES, seed=5), fds)
    assert bench.do(Task.READ) is None
    expected = b"".join(
        contents[span.file][span.offset : span.offset + span.nbytes] for span in bench.spans
    )
    assert bytes(bench.memory) == expected
    assert bytes(bench.digests) == digests_of(expected)


def test_what_is_in_no_span_stays_and_memory_is_read_as_files_are(
    opened: Opened, tmp_path: Path
) -> None:
    data, literal = random_bytes(), bytearray(random_bytes(2, 3000))
    spans = (
        Span(IN_MEMORY, address(literal) + 1000, 100, 2000),
        Span(0, BLOCK, BLOCK, NBYTES - BLOCK),
    )
    bench = Bench(NBYTES, spans, [opened(tmp_path / "f", data)])
    assert bench.do(Task.READ) is None
    gap = b"\xa5"
    expected = gap * 100 + literal[1000:] + gap * (BLOCK - 2100) + data[BLOCK:]
    assert bytes(bench.memory) == expected
    assert bytes(bench.digests) == digests_of(expected)


def test_a_file_that_ends_early_is_told_with_the_byte(opened: Opened, tmp_path: Path) -> None:
    fd = opened(tmp_path / "f", random_bytes()[: 3 * BLOCK + 77])
    spans = (Span(0, 0, 0, 1000), Span(0, 1000, 1000, NBYTES - 1000))
    bench = Bench(NBYTES, spans, [fd])
    stopped = bench.do(Task.READ, threads=1)
    assert stopped is not None
    assert stopped.failure == Failure(FailureKind.END_OF_FILE, 0, 1, 2, 3 * BLOCK + 77)
    assert bench.schedule.span(2).file == 0


@pytest.mark.parametrize("task", [Task.READ, Task.WRITE, Task.COMPARE])
def test_a_system_call_that_fails_is_told_with_its_number_and_place(
    tmp_path: Path, task: Task
) -> None:
    data = random_bytes()
    folder = os.open(tmp_path, os.O_RDONLY)
    spans = (Span(IN_MEMORY, 0, 0, 0), Span(0, 70, BLOCK + 5, 1000))
    bench = promised(Bench(NBYTES, spans, [folder]), data)
    stopped = bench.do(task)
    os.close(folder)
    assert stopped is not None
    code = errno.EBADF if task is Task.WRITE else errno.EISDIR
    assert stopped.failure == Failure(FailureKind.ERRNO, code, 0, 0, 70)
    assert stopped.failure.reason == os.strerror(code)


@pytest.mark.parametrize("block", [0, 3, 5])
@pytest.mark.parametrize("task", [Task.WRITE, Task.COMPARE])
def test_a_damaged_block_is_found_and_nothing_is_done_with_it(
    opened: Opened, tmp_path: Path, task: Task, block: int
) -> None:
    data = random_bytes()
    bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [opened(tmp_path / "f", b"\x11" * NBYTES)])
    promised(bench, data).memory[min((block + 1) * BLOCK, NBYTES) - 1] ^= 1
    stopped = bench.do(task, threads=1)
    assert stopped is not None
    piece, in_piece = block // 2, block % 2 * BLOCK
    assert stopped.failure == Failure(FailureKind.DAMAGED, 0, piece, -1, in_piece)
    written = data[: block * BLOCK] if task is Task.WRITE else b""
    assert (tmp_path / "f").read_bytes() == written + b"\x11" * (NBYTES - len(written))


def test_a_tolerant_pool_goes_on_and_leaves_zeros_for_what_is_not_proven(
    opened: Opened, tmp_path: Path
) -> None:
    data = random_bytes()
    bench = promised(Bench(NBYTES), data)
    bench.memory[2 * BLOCK] ^= 1
    assert bench.do(Task.WRITE, tolerant=True) is None
    whole, at = digests_of(data), 2 * DIGEST_NBYTES
    expected = whole[:at] + bytes(DIGEST_NBYTES) + whole[at + DIGEST_NBYTES :]
    assert bytes(bench.digests) == expected


def test_writing_puts_each_span_where_it_belongs_in_files_and_memory(
    opened: Opened, tmp_path: Path
) -> None:
    data, there = random_bytes(), bytearray(1500)
    fds = [opened(tmp_path / str(i), b"") for i in range(3)]
    cut = 3 * BLOCK + 4321
    spans = (
        Span(1, 10, 0, cut),
        Span(IN_MEMORY, address(there) + 300, cut, 1000),
        Span(2, 7, cut + 1000, NBYTES - cut - 1000),
    )
    assert promised(Bench(NBYTES, spans, fds), data).do(Task.WRITE) is None
    assert (tmp_path / "0").read_bytes() == b""
    assert (tmp_path / "1").read_bytes() == bytes(10) + data[:cut]
    assert bytes(there) == bytes(300) + data[cut : cut + 1000] + bytes(200)
    assert (tmp_path / "2").read_bytes() == bytes(7) + data[cut + 1000 :]


def test_comparing_finds_the_first_byte_that_differs_in_each_span(
    opened: Opened, tmp_path: Path
) -> None:
    data = random_bytes()
    here = bytearray(data)
    cuts = [0, 1000, 2 * BLOCK, 4 * BLOCK, 5 * BLOCK + 7, NBYTES]
    for at in (999, 3 * BLOCK + 4, 3 * BLOCK + 5, 5 * BLOCK + 7, NBYTES - 1):
        here[at] ^= 0x80
    fd = opened(tmp_path / "f", bytes(here))
    spans = [Span(0, begin, begin, end - begin) for begin, end in pairwise(cuts)]
    bench = promised(Bench(NBYTES, spans, [fd]), data)
    assert bench.do(Task.COMPARE) is None
    assert bench.found() == {0: 999, 2: 3 * BLOCK + 4, 4: 5 * BLOCK + 7}


def test_a_write_beyond_a_limit_is_told_with_its_number(opened: Opened, tmp_path: Path) -> None:
    bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [opened(tmp_path / "f", b"")])
    promised(bench, random_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * BLOCK + 1000, hard))
    try:
        stopped = bench.do(Task.WRITE, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert stopped is not None
    # A short write first, up to the limit.
    assert stopped.failure == Failure(FailureKind.ERRNO, errno.EFBIG, 1, 1, 3 * BLOCK + 1000)


def test_short_and_interrupted_reads_and_writes_go_on_where_they_stopped(
    pool: str, monkeypatch: pytest.MonkeyPatch, opened: Opened, tmp_path: Path
) -> None:
    if pool == "native":
        use_native(monkeypatch, "-include", str(Path(__file__).with_name("short_io.h")))
    else:
        preadv, pwrite = os.preadv, os.pwrite
        monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:70_001]], at))
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:70_001], at))
    data = random_bytes()
    fds = [opened(tmp_path / "from", data), opened(tmp_path / "to", b"")]
    bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), fds)
    assert bench.do(Task.READ) is None
    bench = promised(Bench(NBYTES, (Span(1, 0, 0, NBYTES),), fds), bytes(bench.memory))
    assert bench.do(Task.WRITE) is None
    assert (tmp_path / "to").read_bytes() == data
    bench.fds = fds[::-1]
    assert bench.do(Task.COMPARE) is None
    assert bench.found() == {}


def test_a_unit_is_done_only_after_it_is_allowed_and_in_any_order_of_waiting(
    opened: Opened, tmp_path: Path
) -> None:
    data = random_bytes()
    bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [opened(tmp_path / "f", data)])
    pool = bench.start(Task.READ)
    assert not pool.wait(0, 0)
    assert not pool.wait(0, 0.05)
    pool.allow(1)
    assert pool.wait(0, 20)
    assert bytes(bench.memory) == data[:UNIT] + b"\xa5" * (NBYTES - UNIT)
    later = Waiter(lambda: pool.wait(2, 20))
    assert later.waits()
    pool.allow(3)
    assert later.result() is True
    assert pool.wait(1, 20)
    assert bytes(bench.memory) == data
    totals = pool.totals()
    assert totals.nbytes == NBYTES
    assert 0 < totals.busy_s < 20
    assert 0 <= time.perf_counter() - totals.last_end < 20
    assert totals.first_begin < totals.last_end
    assert pool.close(20)
    assert pool.wait(0, 0)  # what is done stays so


def test_stopping_wakes_whoever_waits_and_ends_threads_that_have_nothing_to_do() -> None:
    with no_thread_left():
        pool = Bench(NBYTES).start(Task.WRITE, threads=8)
        waiters = [Waiter(lambda unit=unit: pool.wait(unit, 20)) for unit in (0, 1, 2)]
        assert all(waiter.waits() for waiter in waiters)
        pool.stop()
        for waiter in waiters:
            with pytest.raises(PoolStopped) as caught:
                waiter.result()
            assert caught.value.failure is None
        assert pool.close(20)
        assert pool.close(20)


@pytest.mark.parametrize("seed", range(12))
def test_a_stop_at_any_time_is_soon_over(
    opened: Opened, tmp_path: Path, seed: int, pauses: None
) -> None:
    data, dice = random_bytes(), random.Random(seed)
    bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [opened(tmp_path / "f", data)])
    with no_thread_left():
        pool = bench.start(Task.READ, threads=dice.randint(1, 4))
        pool.allow(dice.randint(0, 3))
        time.sleep(dice.random() * 0.004)
        stopping = [Waiter(pool.stop) for _ in range(2)]
        began = time.monotonic()
        assert pool.close(20)
        assert time.monotonic() - began < 2
        for each in stopping:
            each.result()
    for unit in range(3):
        with suppress(PoolStopped):
            if pool.wait(unit, 0):
                part = slice(unit * UNIT, (unit + 1) * UNIT)
                assert bytes(bench.memory[part]) == data[part]


def test_a_thread_that_is_stuck_in_a_read_holds_up_nobody_and_keeps_its_memory(
    opened: Opened, tmp_path: Path, held_reads: Hold
) -> None:
    data = random_bytes()
    gate = held_reads(BLOCK)
    with no_thread_left():
        bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [opened(tmp_path / "f", data)])
        pool = bench.start(Task.READ, threads=2)
        pool.allow(3)
        gate.await_reached()
        waiting = Waiter(partial(pool.wait, 2, 20))
        assert waiting.waits()
        began = time.monotonic()
        assert not pool.close(0.2)
        assert 0.15 < time.monotonic() - began < 2
        with pytest.raises(PoolStopped):
            waiting.result()
        memory, table = bench.memory, bench.digests
        num_references = sys.getrefcount(memory)
        del pool, bench, waiting  # whoever drops the pool does not free what the thread uses
        assert sys.getrefcount(memory) == num_references - 1
        gate.open()
        eventually(lambda: memory[: 2 * BLOCK] == data[: 2 * BLOCK], "the stuck read")
        assert len(table) == 6 * DIGEST_NBYTES


def test_a_second_pool_in_the_same_process_begins_anew(opened: Opened, tmp_path: Path) -> None:
    data = random_bytes()
    num_before = num_descriptors()
    fd = opened(tmp_path / "f", data)
    with no_thread_left():
        for _ in range(20):
            bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [fd])
            assert bench.do(Task.READ) is None
            assert bytes(bench.memory) == data
    assert num_descriptors() == num_before + 1


USES_NATIVE = f"""
import tests.io.pools as p
from pathlib import Path
from packcast.io import native
library = native.open_library(Path("{built()}"))
native.installed = lambda: library
"""


def test_more_threads_than_the_system_allows_are_an_error_and_those_begun_end(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pool == "python":
        real, count = threading.Thread.start, iter(range(100))

        def start(thread: threading.Thread) -> None:
            if next(count) == 3:
                raise RuntimeError("can't start new thread")
            real(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
    else:
        script = USES_NATIVE + (
            "import resource\n"
            "from packcast.io.work import Task\n"
            "from packcast.errors import TransferError\n"
            "limit = int(open('/proc/self/statm').read().split()[0]) * 4096 + (40 << 20)\n"
            "b = p.Bench(1000)\n"
            "before = p.num_threads()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (limit, -1))\n"
            "try: b.start(Task.WRITE, threads=5000)\n"
            "except TransferError as error: print(error.message)\n"
            "assert p.num_threads() == before, p.num_threads()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY
        )
        assert done.stdout.startswith("cannot start 5000 I/O threads: "), done
        assert "unavailable" in done.stdout
        assert done.returncode == 0, done.stderr
        return
    with no_thread_left(), pytest.raises(TransferError, match="cannot start 5 I/O threads: can't"):
        Bench(NBYTES).start(Task.WRITE, threads=5)


def test_a_fork_in_mid_work_ends_as_if_there_were_no_pool(pool: str) -> None:
    script = (USES_NATIVE if pool == "native" else "import tests.io.pools as p\n") + (
        "import os, sys, gc, signal\n"
        "from packcast.io.work import Task\n"
        "running = p.Bench(1 << 20).start(Task.WRITE)\n"
        "if os.fork() == 0:\n"
        "    signal.alarm(20)\n"  # it would wait forever for threads that are not there
        "    del running; gc.collect(); sys.exit(0)\n"
        "assert os.wait()[1] == 0\n"
        "running.allow(1); print(running.close(20))\n"
    )
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PACKCAST_POOL": pool}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert done.stdout == "True\n", done
