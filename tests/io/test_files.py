"""The table of open files: opened for the unit that needs them, within a limit, closed for sure."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from packcast.errors import TransferError
from packcast.io import files
from packcast.io.files import FileTable, close_quietly
from packcast.io.schedule import Schedule, Span, make_schedule
from packcast.packed.plan import BLOCK, Chunk, Extent
from tests.helpers.forge import REPOSITORY
from tests.helpers.processes import num_descriptors
from tests.helpers.waiting import Waiter

NUM_FILES = 6


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At most two files open at once."""
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 2)
    num_before = num_descriptors()
    yield
    assert num_descriptors() == num_before


def schedule_of(*units: list[int]) -> Schedule:
    """Units that each need these files."""
    chunks = [
        Chunk(i, 0, tuple(Extent(file, i * BLOCK, 10) for file in own), 10 * len(own), 0)
        for i, own in enumerate(units)
    ]
    return make_schedule(
        chunks, BLOCK, lambda *_: 0, lambda extent: [Span(extent.file, extent.offset, 0, 10)]
    )


def table(**options: bool) -> FileTable:
    return FileTable(
        NUM_FILES, lambda _: os.open(os.devnull, os.O_RDONLY), close_quietly, **options
    )


def open_in(table: FileTable) -> set[int]:
    return {file for file, fd in enumerate(table.descriptors) if fd >= 0}


def test_a_unit_waits_for_room_unless_it_is_the_next(limited: None) -> None:
    it = table()
    units = schedule_of([0, 1], [2], [0, 3, 4, 5]).units
    assert it.admit(units[0], is_next=True)
    assert open_in(it) == {0, 1}
    assert not it.admit(units[1], is_next=False)
    it.retire(units[0])  # file 0 is needed again
    assert open_in(it) == {0}
    assert it.admit(units[1], is_next=False)
    it.retire(units[1])
    assert not it.admit(units[2], is_next=False)
    assert it.admit(units[2], is_next=True)  # more than the limit, since it needs them all
    assert open_in(it) == {0, 3, 4, 5}
    it.retire(units[2])
    assert open_in(it) == set()


def test_files_that_are_kept_open_make_room_for_others_the_oldest_first(limited: None) -> None:
    it = table(keeps_open=True)
    units = schedule_of([0], [1], [2], [3]).units
    for unit, kept in zip(units, ({0}, {0, 1}, {1, 2}, {2, 3}), strict=True):
        assert it.admit(unit, is_next=True)
        it.retire(unit)
        assert open_in(it) == kept
    with it.borrow(0) as fd:
        os.fstat(fd)
        assert 0 in open_in(it)
    it.close()
    assert open_in(it) == set()


def test_nothing_is_closed_under_io_threads_or_a_borrower(limited: None) -> None:
    it = table(keeps_open=True)
    unit = schedule_of([0, 1]).units[0]
    assert it.admit(unit, is_next=True)
    it.hold()
    it.close()
    assert open_in(it) == {0, 1}
    assert not it.wait_closed(0)
    with pytest.raises(TransferError, match="aborted"):
        it.open(2)
    waiting = Waiter(lambda: it.wait_closed(20))
    it.retire(unit)
    assert open_in(it) == {0, 1}
    it.let_go()
    assert waiting.result() is True
    assert open_in(it) == set()
    it.retire(unit)  # by a loop that did not hear of it yet
    other = table(keeps_open=True)
    with other.borrow(3) as fd:
        other.close()
        os.fstat(fd)
    assert open_in(other) == set()


def test_a_low_hard_limit_is_kept_with_room_for_the_rest_of_the_process() -> None:
    script = (
        "import resource, sys\n"
        "from packcast.io.files import open_files_limit\n"
        "soft, hard = map(int, sys.argv[1:3])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "print(*(open_files_limit(n) for n in (1, 100, 5000)))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    cases = [((64, 64), [1, 32, 32], 64), ((64, 400), [1, 100, 200], 400)]
    if hard == resource.RLIM_INFINITY or hard >= 4096:
        cases.append(((256, 4096), [1, 100, 1024], 1024 + 256))
    for (soft, most), expected, raised in cases:
        done = subprocess.run(
            [sys.executable, "-c", script, str(soft), str(most)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        assert done.stdout.split() == [*map(str, expected), str(raised)], done
