"""The limit of a row: its stages at once, as many bytes as the row, on ranks over real gloo.

Also the way that it takes beside a GPU, with streams whose work is done at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from packcast.bench import limits
from packcast.bench.dataset import Dataset
from packcast.bench.limits import LimitMethod
from packcast.bench.methods import RunFailed
from packcast.bench.model import BenchSink
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.packed.ring import Broadcast
from packcast.units import MIB
from tests.bench.samples import case
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.ranks import run_ranks
from tests.transfer.offers import offer_of

WORLD_SIZE = 3


@dataclass
class FakeRanks:
    """One of the ranks, as a limit knows them; counts what it broadcasts."""

    rank: int
    true_broadcast: Broadcast
    on_gpu: bool
    device = torch.device("cpu")
    hosts = (0, 0, 0)
    world_size = WORLD_SIZE
    num_broadcast = 0

    @property
    def is_sender(self) -> bool:
        return self.rank == 0

    def on_my_host(self, ranks: Any) -> int:
        return len(ranks)

    def synchronize(self) -> None: ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self.true_broadcast(tensor, root)
        self.num_broadcast += tensor.numel()


class Stream:
    """A GPU's stream whose work is done at once, since that of a CPU is."""

    def __init__(self, device: torch.device, priority: int = 0) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self) -> Stream:
        return self


class Staging:
    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.zeros(nbytes, dtype=torch.uint8)

    def close(self, *, is_idle: bool) -> None:
        assert is_idle


@pytest.fixture(params=[False, True], ids=["cpu", "as on a gpu"])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(limits, "PinnedMemory", Staging)
    return bool(request.param)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpt"
    for i, count in enumerate((777, 3 * MIB + 1, 5 * MIB - 5)):
        write_safetensors(folder / f"{i}.safetensors", {f"t{i}": ("U8", (count,))})
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    threads = set(threading.enumerate())
    yield
    assert not {thread.name for thread in set(threading.enumerate()) - threads}
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    assert not [link for link in links if link.startswith(str(tmp_path))]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("rank")]


def measure(
    folder: Path,
    checkpoint: Path,
    sink: BenchSink,
    readers: int,
    on_gpu: bool,
    then: Callable[[], object] = lambda: None,
    turn: int = 1,
) -> tuple[int, list[Any]]:
    """The bytes of a row; and for each rank its broadcast bytes, its I/O, or why it failed."""
    found = open_checkpoint(checkpoint)
    files = outgoing_files(found)
    offer = offer_of([file.spec for file in files])
    then()

    def body(rank: int, broadcast: Broadcast) -> Any:
        ranks: Any = FakeRanks(rank, broadcast, on_gpu)
        method = LimitMethod(
            case=case(
                sink=sink, readers=readers, limit="together", buffer_size=2 * MIB, num_buffers=2
            ),
            ranks=ranks,
            data=Dataset("x", checkpoint=found, files=files, offer=offer, able=(0, 1, 2)),
            run_id="run",
            turn=turn,
            nbytes=offer.nbytes,
            cold=False,
            write_folder=folder / f"rank-{rank}",
        )
        try:
            method.prepare()
            method.poison()
            method.run()
            pools = [pool.totals().nbytes for pool, _ in method._pools]
            return ranks.num_broadcast, pools
        except RunFailed as error:
            return error.message
        finally:
            method.close()

    return offer.nbytes, run_ranks(WORLD_SIZE, body, 30)


@pytest.mark.parametrize(("readers", "turn"), [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("sink", ["discard", "land", "write", "verify"])
def test_every_stage_of_every_rank_moves_what_the_row_moves(
    tmp_path: Path, checkpoint: Path, sink: BenchSink, readers: int, turn: int, on_gpu: bool
) -> None:
    nbytes, found = measure(tmp_path, checkpoint, sink, readers, on_gpu, turn=turn)
    assert [broadcast for broadcast, _ in found] == [nbytes] * WORLD_SIZE
    pools = [pool for _, pool in found]
    writes = sink in ("write", "verify") or (sink == "land" and not on_gpu)
    if sink != "verify":
        read = [sum(pool[: rank < readers]) for rank, pool in enumerate(pools)]
        assert sum(read) == nbytes
    for rank in (1, 2):
        assert pools[rank][-1:] == [nbytes] if writes else len(pools[rank]) == (rank < readers)


def test_a_rank_that_fails_in_the_middle_leaves_nobody_waiting(
    tmp_path: Path, checkpoint: Path
) -> None:
    path = checkpoint / "2.safetensors"
    nbytes, found = measure(
        tmp_path, checkpoint, "discard", 1, False, lambda: os.truncate(path, 4 * MIB)
    )
    assert found[0] == "an I/O thread failed: a file has ended early"
    assert [broadcast for broadcast, _ in found[1:]] == [nbytes] * 2
