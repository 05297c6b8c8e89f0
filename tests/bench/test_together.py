"""The limit of a row: its stages at once, moving the very bytes, on ranks over real gloo."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from packcast.bench import bare, together
from packcast.bench.limits import Pace
from packcast.bench.model import BenchSink
from packcast.bench.together import Together, pace_together
from packcast.errors import PackcastError
from packcast.io.pool import pool_kind
from packcast.packed.ring import Broadcast
from packcast.units import MIB
from tests.helpers.ranks import run_ranks

# An empty file, a short one, and three that take turns; none is a multiple of anything.
SIZES = {"a": 0, "b": 777, "c": 3 * MIB + 1, "d": 9 * MIB - 5, "e": 8 * MIB + 4096}
WORLD_SIZE = 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """One of the ranks, as together.py knows them."""

    rank: int
    _broadcast: Broadcast
    sender: int = 0
    world_size: int = WORLD_SIZE
    device: torch.device = CPU

    @property
    def is_sender(self) -> bool:
        return self.rank == self.sender

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self._broadcast(tensor, src)

    def synchronize(self) -> None: ...

    def start_together(self) -> None:
        for rank in range(self.world_size):
            self.broadcast(torch.zeros(1), rank)


WHAT = Together(
    sink="discard",
    readers=(0,),
    files=tuple(SIZES.items()),
    limit_nbytes=1 << 40,
    buffer_size=2 * MIB,
    num_buffers=2,
    read_threads=2,
    write_threads=2,
    staging_nbytes=4 * MIB,
)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """The files, in names that are not those which are offered."""
    (tmp_path / "blobs").mkdir()
    found = {}
    for name, nbytes in SIZES.items():
        found[name] = tmp_path / "blobs" / f"{name}.blob"
        found[name].write_bytes(os.urandom(nbytes))
    return found


@pytest.fixture(params=["native", "python"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and pool_kind() != "native":
        pytest.skip("nothing was compiled here")
    monkeypatch.setenv("PACKCAST_POOL", request.param)


class Stream:
    """A GPU's stream whose work is done at once, since that of a CPU is."""

    def __init__(self, device: torch.device, priority: int = 0) -> None: ...
    def wait_event(self, event: Stream) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self) -> Stream:
        return self

    def query(self) -> bool:
        return True


class Staging:
    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.zeros(nbytes, dtype=torch.uint8)

    def close(self, *, is_idle: bool) -> None:
        assert is_idle


@pytest.fixture(params=["cpu", "as on a gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        return "cpu"

    def make(*arguments: Any, **named: Any) -> bare.DeviceLoop:
        return bare.DeviceLoop(*arguments, **named, staging_nbytes=WHAT.staging_nbytes)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(bare, "PinnedMemory", Staging)
    monkeypatch.setattr(together, "HostLoop", make)
    return "gpu"


def open_files() -> Iterator[str]:
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            yield os.readlink(f"/proc/self/fd/{descriptor}")


@pytest.fixture
def loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, bare.Loop]]:
    """Every rank's loop as it was; and nothing of it is left at the end."""
    found: dict[int, bare.Loop] = {}
    make = together._make_loop

    def kept(team: Any, *arguments: Any, **named: Any) -> bare.Loop:
        found[team.rank] = make(team, *arguments, **named)
        return found[team.rank]

    monkeypatch.setattr(together, "_make_loop", kept)
    threads = set(threading.enumerate())
    yield found
    assert {thread.name for thread in set(threading.enumerate()) - threads} == set()
    assert not [link for link in open_files() if link.startswith(str(tmp_path))]


def measure(
    what: Together, paths_of: Callable[[int], dict[str, Path]], folder: Path
) -> list[Pace | Exception]:
    """What each rank finds, or raises."""

    def body(rank: int, broadcast: Broadcast) -> Pace | Exception:
        team: Any = Ranks(rank, broadcast)
        try:
            return pace_together(
                team,
                team.start_together,
                what,
                paths_of(rank),
                folder / f"rank-{rank}",
                cold=False,
            )
        except Exception as error:
            return error

    return run_ranks(WORLD_SIZE, body, 30)


@pytest.mark.parametrize("readers", [(0,), (0, 1), (2, 0, 1)])
@pytest.mark.parametrize("sink", ["discard", "land", "write", "verify"])
def test_every_byte_goes_through_all_stages_of_every_rank(
    sink: BenchSink,
    readers: tuple[int, ...],
    pool: None,
    device: str,
    paths: dict[str, Path],
    tmp_path: Path,
    loops: dict[int, bare.Loop],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    what = replace(WHAT, sink=sink, readers=readers)
    for pace in measure(what, lambda _: paths, tmp_path):
        assert isinstance(pace, Pace), pace
        assert pace.nbytes == sum(SIZES.values())
        assert pace.seconds > 0
    content = [path.read_bytes() for path in paths.values()]
    in_order = b"".join(
        content[extent.file][extent.offset : extent.offset + extent.nbytes]
        for chunk in what.chunks()
        for extent in chunk.extents
    )
    for rank in (1, 2):
        if sink == "write":
            folder = tmp_path / f"rank-{rank}"
            assert [(folder / str(i)).read_bytes() for i in range(len(SIZES))] == content
        if sink == "land":
            target = loops[rank].target
            assert target is not None
            assert bytes(target.numpy()) == in_order
    assert not (tmp_path / "rank-0").exists()


def test_of_a_large_checkpoint_a_part_is_moved(paths: dict[str, Path], tmp_path: Path) -> None:
    what = replace(WHAT, sink="write", limit_nbytes=5 * MIB)
    (pace, *_) = measure(what, lambda _: paths, tmp_path)
    assert isinstance(pace, Pace)
    assert 5 * MIB <= pace.nbytes <= 7 * MIB
    assert [path.name for path in tmp_path.iterdir()] == ["blobs"]


def test_a_comparison_that_finds_a_difference_makes_no_limit(
    paths: dict[str, Path], tmp_path: Path, loops: dict[int, bare.Loop]
) -> None:
    other = tmp_path / "other"
    data = bytearray(paths["d"].read_bytes())
    data[5 * MIB] ^= 1
    other.write_bytes(data)
    what = replace(WHAT, sink="verify")
    found = measure(what, lambda rank: paths | ({"d": other} if rank == 1 else {}), tmp_path)
    assert [type(one) for one in found] == [Pace, PackcastError, Pace]
    assert "other bytes arrive" in str(found[1])


def test_a_rank_that_cannot_begin_is_waited_for_by_nobody(
    paths: dict[str, Path], tmp_path: Path, loops: dict[int, bare.Loop]
) -> None:
    (tmp_path / "rank-2").mkdir()  # where it should make its own
    found = measure(replace(WHAT, sink="write"), lambda _: paths, tmp_path)
    assert [str(one) for one in found[:2]] == ["rank 2 could not begin"] * 2
    assert isinstance(found[2], FileExistsError)


def test_a_rank_that_fails_in_the_middle_lets_the_others_go_on(
    pool: None, paths: dict[str, Path], tmp_path: Path, loops: dict[int, bare.Loop]
) -> None:
    os.truncate(paths["e"], 4 * MIB)
    found = measure(replace(WHAT, sink="land"), lambda _: paths, tmp_path)
    assert [type(one) for one in found] == [PackcastError, Pace, Pace]
    assert str(found[0]) == "an I/O thread failed: a file has ended early"
