"""Cold means that the kernel says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from packcast.bench.pagecache import cached_nbytes, check_can_be_cold, evict, file_system_of
from packcast.errors import UsageError
from packcast.units import MIB


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    if file_system_of(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("temporary files are not on a disk here")
    return tmp_path


@pytest.fixture
def in_memory() -> Iterator[Path]:
    path = Path(f"/dev/shm/packcast-test-{os.getpid()}")
    path.write_bytes(os.urandom(MIB))
    yield path
    path.unlink()


def cached(path: Path) -> int:
    with path.open("rb") as file:
        return cached_nbytes(file.fileno(), path.stat().st_size)


def test_a_written_file_is_cached_until_it_is_evicted(on_disk: Path) -> None:
    path = on_disk / "file"
    path.write_bytes(os.urandom(4 * MIB + 1))
    assert cached(path) == 4 * MIB + 1
    evict([path])
    assert cached(path) == 0
    path.read_bytes()
    assert cached(path) == 4 * MIB + 1


def test_an_empty_file_is_cold(on_disk: Path) -> None:
    (on_disk / "empty").touch()
    evict([on_disk / "empty"])


def test_files_in_memory_cannot_be_cold(in_memory: Path) -> None:
    with pytest.raises(UsageError, match="is on tmpfs, whose files are always in memory"):
        check_can_be_cold(in_memory.parent / "not" / "made" / "yet")
    with pytest.raises(UsageError, match=rf"1\.0 MiB of {in_memory} stay in the page cache"):
        evict([in_memory])


def test_files_on_a_disk_can_be_cold(on_disk: Path) -> None:
    check_can_be_cold(on_disk / "not-made-yet")
