"""Files -> staging -> slots -> broadcast -> slots -> staging -> sink, on ranks over real gloo."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.io import source as source_module
from packcast.io.landing import Landing
from packcast.io.source import FileReader, FileSource
from packcast.io.unit_runner import UnitRunner
from packcast.packed import plan
from packcast.packed.counters import StageTotal
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import plan_chunks
from packcast.packed.ring import Broadcast
from tests.helpers.checkpoints import every_dtype, sharded, write_safetensors
from tests.helpers.processes import num_descriptors
from tests.helpers.ranks import run_ranks
from tests.helpers.sinks import MemorySink
from tests.io.alone import make_buffers
from tests.io.cuda import Cudart
from tests.io.pools import no_thread_left

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("pool")


@dataclass
class Setup:
    """One way of sending a checkpoint; the hooks run on every rank, with the rank first."""

    workers: int = 1
    readers: int = 1
    buffer_size: int = MIB
    num_buffers: int = 2
    staging_nbytes: int = 0
    threads: int = 3
    before: Callable[[int, int, int], None] = lambda rank, file, offset: None
    spoil: Callable[[int, torch.Tensor], None] = lambda rank, tensor: None
    include: tuple[str, ...] = ()
    timeout_s: float = 30


@dataclass
class Ending:
    """What a rank has at the end."""

    bytes: list[bytes] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    totals: dict[str, StageTotal] = field(default_factory=dict)


def send(checkpoint: Checkpoint, setup: Setup) -> tuple[tuple[OutgoingFile, ...], list[Ending]]:
    """Send it from rank 0 to all; the outgoing files and the ranks' outcomes."""
    files = outgoing_files(checkpoint, include=setup.include)
    specs = [file.spec for file in files]
    chunks = plan_chunks([spec.nbytes for spec in specs], setup.buffer_size, range(setup.readers))

    def rank_body(rank: int, broadcast: Broadcast) -> Ending:
        buffers = make_buffers(
            setup.buffer_size, setup.num_buffers, staging_nbytes=setup.staging_nbytes
        )
        source = drain = sink = None
        if rank < setup.readers:
            mine = [chunk for chunk in chunks if chunk.root == rank]
            reader = FileReader(files, checkpoint.files)
            source = FileSource(mine, reader, buffers, num_threads=setup.threads)
            source.read_ahead()
        if rank > 0:
            sink = MemorySink(specs, lambda file, offset: setup.before(rank, file, offset))
            drain = Landing(chunks, sink, specs, buffers, num_threads=setup.threads)

        def spoiled(tensor: torch.Tensor, root: int) -> None:
            broadcast(tensor, root)
            setup.spoil(rank, tensor)

        run_pipeline(
            chunks,
            rank=rank,
            ring=buffers.ring,
            broadcast=spoiled,
            source=source,
            drain=drain,
            begin=lambda chunk, _: source.begin(chunk) if source and chunk.root == rank else None,
        )
        found = drain or source
        return Ending(
            sink.bytes if sink else [],
            found.digests().of_files() if found else [],
            dict(buffers.ring.counters.totals()),
        )

    return files, run_ranks(setup.workers + 1, rank_body, setup.timeout_s)


def arrives(checkpoint: Checkpoint, setup: Setup) -> list[Ending]:
    """Send it, and compare every byte on every worker with the source."""
    with no_thread_left():
        files, outcomes = send(checkpoint, setup)
    for outcome in outcomes[1:]:
        for file, got in zip(files, outcome.bytes, strict=True):
            source = next(s for s in checkpoint.files if s.name == file.spec.name)
            assert source.path.read_bytes() == got, file.spec.name
        assert outcome.digests == outcomes[1].digests
    if setup.readers == 1:
        assert outcomes[0].digests == outcomes[1].digests
    return outcomes


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 4])
@pytest.mark.parametrize(("workers", "readers"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (3, 4)])
def test_every_shape_of_group_and_ring_delivers_every_byte(
    tmp_path: Path, workers: int, readers: int, num_buffers: int
) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 3, 3 * MIB, seed=workers))
    arrives(checkpoint, Setup(workers, readers, num_buffers=num_buffers))


@pytest.mark.parametrize("buffer_size", [MIB, 2 * MIB, 64 * MIB])
def test_every_dtype_and_odd_place_arrives(tmp_path: Path, buffer_size: int) -> None:
    write_safetensors(tmp_path / "all.safetensors", every_dtype(), pad=3)
    arrives(open_checkpoint(tmp_path), Setup(buffer_size=buffer_size))


def empty_files(folder: Path) -> Path:
    write_safetensors(folder / "none.safetensors", {})
    (folder / "empty.txt").write_text("")
    return folder


@pytest.mark.parametrize(
    ("make", "setup"),
    [
        (lambda folder: sharded(folder, 1, 5 * MIB + 11), Setup()),
        (lambda folder: sharded(folder, 30, 40_000), Setup(workers=2, buffer_size=4 * MIB)),
        (lambda folder: sharded(folder, 2, 1000), Setup(3, readers=4, buffer_size=4 * MIB)),
        (empty_files, Setup()),
    ],
    ids=["split tensors", "shards share chunks", "readers without a chunk", "empty files"],
)
def test_checkpoints_of_odd_shapes_arrive(
    tmp_path: Path, make: Callable[[Path], Path], setup: Setup
) -> None:
    arrives(open_checkpoint(make(tmp_path / "c")), setup)


@pytest.mark.parametrize("staging_mib", [0, 5])
def test_a_selection_arrives_as_the_segments_say(
    tmp_path: Path, staging_mib: int, cudart: Cudart
) -> None:
    """A new header, which is in no file, and runs of the source."""
    tensors = {f"t{i}": ("U8", (MIB // 2 + i,)) for i in range(9)}
    write_safetensors(tmp_path / "m.safetensors", tensors, seed=3)
    checkpoint = open_checkpoint(tmp_path)
    source = checkpoint.files[0]
    setup = Setup(include=("t[1357]",), staging_nbytes=staging_mib * MIB)
    files, outcomes = send(checkpoint, setup)
    got = outcomes[1].bytes[0]
    header = files[0].spec.header
    assert header is not None
    assert [tensor.name for tensor in header.tensors] == ["t1", "t3", "t5", "t7"]
    assert source.header is not None
    whole = source.path.read_bytes()
    was = {tensor.name: tensor for tensor in source.header.tensors}
    for tensor in header.tensors:
        there = was[tensor.name]
        assert got[tensor.begin : tensor.end] == whole[there.begin : there.end]
    head = b"".join(s.data for s in files[0].segments if hasattr(s, "data"))
    assert got.startswith(head)
    assert outcomes[0].digests == outcomes[1].digests


@pytest.mark.parametrize("num_units", [1, 2, 5])
@pytest.mark.parametrize(("workers", "readers"), [(1, 1), (2, 2)])
def test_chunks_of_many_units_go_through_however_little_staging_there_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: str,
    cudart: Cudart,
    workers: int,
    readers: int,
    num_units: int,
) -> None:
    """As beside a GPU: memory of its own between files and slots, here pinned by nobody."""
    monkeypatch.setattr(plan, "MAX_UNIT", 2 * MIB)
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 3, 5 * MIB, seed=4))
    staging = num_units * plan.staged_nbytes(9 * MIB)
    arrives(checkpoint, Setup(workers, readers, 9 * MIB, staging_nbytes=staging))
    assert cudart.pinned == []  # given back
    assert (cudart.device.num_copies > 0) == (pool == "native")


@pytest.mark.parametrize("seed", range(20))
def test_random_delays_everywhere_never_change_a_byte(
    tmp_path: Path, seed: int, pauses: None, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_UNIT", MIB)
    dice = random.Random(seed)
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 2, 3 * MIB, seed=seed))

    def dawdle(*_: object) -> None:
        time.sleep(dice.random() * 0.003)

    arrives(
        checkpoint,
        Setup(
            workers=dice.randint(1, 3),
            readers=dice.randint(1, 2),
            buffer_size=dice.randint(1, 2) * MIB,
            num_buffers=dice.randint(1, 3),
            staging_nbytes=dice.choice([0, 2, 4]) * MIB,
            threads=dice.randint(1, 4),
            before=dawdle,
            spoil=dawdle,
        ),
    )


def test_reading_goes_on_while_broadcasts_are_slow(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"t": ("U8", (8 * MIB,))})
    ahead: list[int] = []
    checkpoint = open_checkpoint(tmp_path)
    files = outgoing_files(checkpoint)
    buffers = make_buffers(MIB, 4)
    chunks = plan_chunks([file.spec.nbytes for file in files], MIB, [0])
    source = FileSource(chunks, FileReader(files, checkpoint.files), buffers, num_threads=2)

    def slowly(*_: object) -> None:
        time.sleep(0.03)
        ahead.append(buffers.ring.counters.nbytes("read"))

    run_pipeline(
        chunks,
        rank=0,
        ring=buffers.ring,
        broadcast=slowly,
        source=source,
        drain=None,
        begin=lambda chunk, _: source.begin(chunk),
    )
    assert ahead[:5] == [i * MIB for i in (4, 5, 6, 7, 8)]


def test_a_read_is_not_waited_for_while_the_network_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Held:
        event, passed_at, is_passed = None, 0.0, False

        def passed(self) -> bool:
            return self.is_passed

        def synchronize(self) -> None:
            self.is_passed = True

    told: list[str | None] = []

    def wait(runner: UnitRunner, unit: int, *more: Any, **options: Any) -> None:
        told.append(counters.standing)
        really_wait(runner, unit, *more, **options)

    really_wait = UnitRunner.wait
    monkeypatch.setattr(UnitRunner, "wait", wait)
    monkeypatch.setattr(source_module, "LOOK_EVERY_S", 0.0)
    write_safetensors(tmp_path / "m.safetensors", {"t": ("U8", (3 * MIB,))})
    checkpoint = open_checkpoint(tmp_path)
    files = outgoing_files(checkpoint)
    buffers = make_buffers(MIB, 4)
    counters, held = buffers.ring.counters, Held()
    chunks = plan_chunks([file.spec.nbytes for file in files], MIB, [0])
    source = FileSource(chunks, FileReader(files, checkpoint.files), buffers, num_threads=1)
    for chunk in chunks:
        slot = buffers.ring.take(chunk)
        source.fill(chunk, slot)
        buffers.ring.broadcast(chunk, slot, lambda _memory, _root: held)
        held.is_passed = chunk.index == 1
    source.close()
    assert told[:3] == ["read", "broadcast", "read"]


def test_every_stage_counts_every_byte_also_once_it_is_over(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 2, MIB))
    outcomes = arrives(checkpoint, Setup(workers=1))
    for rank, stage in ((0, "read"), (0, "broadcast"), (1, "broadcast"), (1, "write")):
        total = outcomes[rank].totals[stage]
        assert total.nbytes == checkpoint.nbytes, stage
        assert 0 < total.busy_s < 30
        assert total.first_begin < total.last_end <= time.perf_counter()


def test_transfers_one_after_the_other_leave_nothing_behind(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 3, MIB))
    arrives(checkpoint, Setup())
    num_before = num_descriptors()
    for _ in range(5):
        arrives(checkpoint, Setup())
    assert num_descriptors() <= num_before
