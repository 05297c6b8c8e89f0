"""Files -> staging -> slots -> broadcast -> slots -> staging -> sink, on ranks over real gloo."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.errors import CheckpointError, DestinationError, PackcastError, TransferError
from packcast.io import hands
from packcast.io.landing import Landing
from packcast.io.source import FileReader, FileSource
from packcast.io.work import Job, Outcome, perform
from packcast.packed.counters import StageEvent
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import Extent, plan_chunks
from packcast.packed.ring import Broadcast
from tests.helpers.checkpoints import every_dtype, sharded, write_safetensors
from tests.helpers.processes import helpers_of
from tests.helpers.ranks import run_ranks
from tests.helpers.sinks import MemorySink
from tests.io.alone import make_buffers, run_alone, specs_of

MIB = 1 << 20


class SlowReader(FileReader):
    """Reads like any other, after a call that may sleep or spoil."""

    before_read: Callable[[int, int], None]

    def job(self, extent: Extent, into: memoryview) -> Job:
        self.before_read(extent.file, extent.offset)
        return super().job(extent, into)


@dataclass
class Setup:
    """One way of sending a checkpoint; the hooks run on every rank, with the rank first."""

    workers: int = 1
    readers: int = 1
    buffer_size: int = MIB
    num_buffers: int = 2
    hands: int = 3
    helpers: bool = False
    before_read: Callable[[int, int, int], None] = lambda rank, file, offset: None
    before_put: Callable[[int, int, int], None] = lambda rank, file, offset: None
    spoil: Callable[[int, torch.Tensor], None] = lambda rank, tensor: None
    include: tuple[str, ...] = ()
    timeout_s: float = 30


@dataclass
class Ending:
    """What a rank has at the end."""

    bytes: list[bytearray] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    trace: list[StageEvent] = field(default_factory=list)


def send(checkpoint: Checkpoint, setup: Setup) -> tuple[tuple[OutgoingFile, ...], list[Ending]]:
    """Send it from rank 0 to all; the outgoing files and the ranks' outcomes."""
    files = outgoing_files(checkpoint, include=setup.include)
    specs = [file.spec for file in files]
    chunks = plan_chunks([spec.nbytes for spec in specs], setup.buffer_size, range(setup.readers))

    def rank_body(rank: int, broadcast: Broadcast) -> Ending:
        buffers = make_buffers(setup.buffer_size, setup.num_buffers, helpers=setup.helpers)
        ring, counters = buffers.ring, buffers.ring.counters
        source = drain = sink = None
        if rank < setup.readers:
            reader = SlowReader(files, checkpoint.files)
            reader.before_read = lambda file, offset: setup.before_read(rank, file, offset)
            source = FileSource(
                [chunk for chunk in chunks if chunk.root == rank],
                reader,
                buffers,
                num_hands=setup.hands,
            )
        if rank > 0:
            sink = MemorySink(specs, lambda file, offset: setup.before_put(rank, file, offset))
            drain = Landing(
                sink,
                specs,
                buffers,
                num_hands=setup.hands,
            )

        def spoiled(tensor: torch.Tensor, root: int) -> None:
            broadcast(tensor, root)
            setup.spoil(rank, tensor)

        run_pipeline(chunks, rank=rank, ring=ring, broadcast=spoiled, source=source, drain=drain)
        digests = (drain or source).digests.of_files() if drain or source else []
        return Ending(sink.bytes if sink else [], digests, counters.trace())

    return files, run_ranks(setup.workers + 1, rank_body, setup.timeout_s)


def arrives(checkpoint: Checkpoint, setup: Setup) -> list[Ending]:
    """Send it, and compare every byte on every worker with the source."""
    files, outcomes = send(checkpoint, setup)
    for outcome in outcomes[1:]:
        for file, got in zip(files, outcome.bytes, strict=True):
            if not setup.include:
                source = next(s for s in checkpoint.files if s.name == file.spec.name)
                assert source.path.read_bytes() == bytes(got), file.spec.name
        assert outcome.digests == outcomes[1].digests
    if setup.readers == 1:
        assert outcomes[0].digests == outcomes[1].digests
    return outcomes


@pytest.mark.parametrize(("workers", "readers", "buffer_size"), [(1, 1, 2), (2, 2, 9), (2, 3, 3)])
def test_helper_processes_deliver_every_byte(
    tmp_path: Path, workers: int, readers: int, buffer_size: int
) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 3, 9 * MIB, seed=workers))
    setup = Setup(workers, readers, buffer_size * MIB, hands=2, helpers=True)
    arrives(checkpoint, setup)


def test_helper_processes_take_a_selection_as_the_segments_say(tmp_path: Path) -> None:
    a_selection_arrives(tmp_path, helpers=True)


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


def test_a_tensor_larger_than_the_buffer_is_split_and_whole_again(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"large": ("U8", (5 * MIB + 11,))})
    arrives(open_checkpoint(tmp_path), Setup(num_buffers=2))


def test_thirty_shards_share_chunks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 30, 40_000))
    arrives(checkpoint, Setup(workers=2, buffer_size=4 * MIB))


def test_a_file_of_no_tensors_and_an_empty_file_arrive(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "none.safetensors", {})
    (tmp_path / "empty.txt").write_text("")
    arrives(open_checkpoint(tmp_path), Setup())


def test_a_selection_arrives_as_the_segments_say(tmp_path: Path) -> None:
    a_selection_arrives(tmp_path, helpers=False)


def a_selection_arrives(tmp_path: Path, *, helpers: bool) -> None:
    tensors = {f"t{i}": ("U8", (MIB // 2 + i,)) for i in range(9)}
    write_safetensors(tmp_path / "m.safetensors", tensors, seed=3)
    checkpoint = open_checkpoint(tmp_path)
    source = checkpoint.files[0]
    files, outcomes = send(checkpoint, Setup(include=("t[1357]",), helpers=helpers))
    got = bytes(outcomes[1].bytes[0])
    header = files[0].spec.header
    assert header is not None
    assert [tensor.name for tensor in header.tensors] == ["t1", "t3", "t5", "t7"]
    assert source.header is not None
    whole = source.path.read_bytes()
    was = {tensor.name: tensor for tensor in source.header.tensors}
    for tensor in header.tensors:
        there = was[tensor.name]
        assert got[tensor.begin : tensor.end] == whole[there.begin : there.end]


@pytest.mark.parametrize("seed", range(20))
def test_random_delays_everywhere_never_change_a_byte(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 2, 3 * MIB, seed=seed))

    def dawdle(rank: int, file: int, offset: int) -> None:
        time.sleep(dice.random() * 0.004)

    arrives(
        checkpoint,
        Setup(
            workers=dice.randint(1, 3),
            readers=dice.randint(1, 2),
            num_buffers=dice.randint(1, 3),
            hands=dice.randint(1, 4),
            before_read=dawdle,
            before_put=dawdle,
        ),
    )


def test_reading_goes_on_while_writing_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"t": ("U8", (8 * MIB,))})

    def slow(job: Job, memory: memoryview) -> Outcome:
        time.sleep(0.02)
        outcome = perform(job, memory)
        return replace(outcome, seconds=outcome.seconds + 0.02)

    monkeypatch.setattr(hands, "perform", slow)
    outcomes = arrives(open_checkpoint(tmp_path), Setup(num_buffers=4))
    read_begins = {e.chunk: e.begin for e in outcomes[0].trace if e.stage == "read"}
    write_ends = {e.chunk: e.end for e in outcomes[1].trace if e.stage == "write"}
    assert len(read_begins) == len(write_ends) == 9
    for chunk in range(1, 8):
        assert read_begins[chunk + 1] < write_ends[chunk]


def test_with_one_buffer_nothing_overlaps_and_nothing_is_overwritten(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"t": ("U8", (4 * MIB,))})
    outcomes = arrives(open_checkpoint(tmp_path), Setup(num_buffers=1))
    broadcasts = [e for e in outcomes[1].trace if e.stage == "broadcast"]
    writes = {e.chunk: e for e in outcomes[1].trace if e.stage == "write"}
    for event in broadcasts[1:]:
        assert event.end > writes[event.chunk - 1].end


def test_every_stage_counts_every_byte(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 2, MIB))
    outcomes = arrives(checkpoint, Setup(workers=1))
    for rank, stage in ((0, "read"), (0, "broadcast"), (1, "broadcast"), (1, "write")):
        counted = sum(e.nbytes for e in outcomes[rank].trace if e.stage == stage)
        assert counted == checkpoint.nbytes, stage


def fails(checkpoint: Checkpoint, setup: Setup, kind: type[PackcastError], says: str) -> None:
    """Send it to one worker, and expect that error from whoever meets it first."""
    with pytest.raises(kind, match=says):
        send(checkpoint, setup)


def test_a_byte_damaged_on_the_way_is_found_with_file_and_place(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (3 * MIB,))})

    def spoil(rank: int, tensor: torch.Tensor) -> None:
        if rank == 1:
            tensor[77] ^= 4

    says = r"m.safetensors: bytes 0 to 1048576 .*damaged on the way, chunk 0"
    fails(open_checkpoint(tmp_path), Setup(spoil=spoil, timeout_s=5), TransferError, says)


def test_a_stale_slot_is_found(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (6 * MIB,))})
    seen: list[torch.Tensor] = []

    def spoil(rank: int, tensor: torch.Tensor) -> None:
        if rank == 1:
            seen.append(tensor.clone())
            if len(seen) == 5:
                tensor.copy_(seen[2])

    fails(open_checkpoint(tmp_path), Setup(spoil=spoil, timeout_s=5), TransferError, "out of order")


def test_a_sink_that_fails_ends_the_transfer_with_its_own_error(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (6 * MIB,))})

    def full(rank: int, file: int, offset: int) -> None:
        if offset >= 2 * MIB:
            raise DestinationError("no space left")

    with pytest.raises(DestinationError, match="no space left"):
        run_one_worker_alone(open_checkpoint(tmp_path), full)


def run_one_worker_alone(
    checkpoint: Checkpoint, before_put: Callable[[int, int, int], None], *, helpers: bool = False
) -> None:
    """A worker whose root never blocks: what it meets is its own."""
    sink = MemorySink(specs_of(checkpoint), lambda file, offset: before_put(0, file, offset))
    run_alone(checkpoint, sink, helpers=helpers)


def test_a_source_that_shrinks_is_an_error_not_a_death(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": ("U8", (6 * MIB,))})
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(2 * MIB)
    with pytest.raises(CheckpointError, match=r"m.safetensors changed while it was being sent"):
        run_one_worker_alone(checkpoint, lambda *_: None)


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": ("U8", (6 * MIB,))})
    changed = threading.Event()

    def touch(rank: int, file: int, offset: int) -> None:
        if offset >= MIB and not changed.is_set():
            changed.set()
            with path.open("r+b") as file_:
                file_.write(b"x")

    with pytest.raises(CheckpointError, match="changed while it was being sent"):
        run_one_worker_alone(open_checkpoint(path), touch)


def test_threads_end_with_the_transfer_also_after_a_failure(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (6 * MIB,))})

    def broken(rank: int, file: int, offset: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(PackcastError, match="a bug"):
        run_one_worker_alone(open_checkpoint(tmp_path), broken)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("packcast")]


@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["read", "write"])
def test_a_helper_that_is_killed_meanwhile_ends_the_transfer_by_its_name(
    tmp_path: Path, stage: str
) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (30 * MIB,))})
    killed: list[int] = []

    def kill_all_of_one_end(rank: int, file: int, offset: int) -> None:
        if offset >= 10 * MIB and not killed:
            helpers = sorted(helpers_of(os.getpid()))  # the source's, then the landing's
            killed.extend(helpers[:1] if stage == "read" else helpers[1:])
            for helper in killed:
                os.kill(helper, signal.SIGKILL)

    with pytest.raises(TransferError) as caught:
        run_one_worker_alone(open_checkpoint(tmp_path), kill_all_of_one_end, helpers=True)
    assert caught.value.message in [
        f"helper process {helper} was killed by SIGKILL" for helper in killed
    ]
    assert helpers_of(os.getpid()) == []
    assert not [t.name for t in threading.enumerate() if t.name.startswith("packcast")]
