"""Files' chunks into tensors by tables, with one rank alone: on a CPU by rows, on a GPU by the
kernel. safetensors is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.checkpoint.tensor_table import Tensor
from packcast.errors import TransferError
from packcast.io.checksummed import ChecksummedSource
from packcast.io.device_landing import DeviceLanding
from packcast.io.sinks import scatter
from packcast.io.sinks.tensor_destination import GivenTensors, NewTensors, TensorDestination
from packcast.io.sinks.tensors import TensorSink
from packcast.io.staging import Buffers
from packcast.packed import plan
from packcast.packed.counters import Counters
from packcast.packed.gather import Move, move_on
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import Chunk, plan_chunks, slot_nbytes
from packcast.packed.ring import Ring, Slot, host_view
from packcast.packed.trailer import transfer_tag, write_trailer
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.dtypes import every_torch_dtype
from tests.io.alone import Kept
from tests.io.sinks import digests_of
from tests.packed.tables import move_by_rows

MIB = 1 << 20
TAG = transfer_tag("test")
POISON = 0xA5

Tensors = dict[str, torch.Tensor]

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@dataclass
class Way:
    """Where the tensors are, and what copies them; `moves` are the tables that it was given."""

    device: torch.device
    by_table: bool
    moves: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files take turns although they are small."""
    monkeypatch.setattr(plan, "TURN", MIB)


@pytest.fixture(
    params=[
        "cpu-table",
        "cpu-plain",
        pytest.param("cuda-table", marks=on_gpu),
        pytest.param("cuda-plain", marks=on_gpu),
    ]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    kind, how = request.param.split("-")
    index = torch.cuda.current_device() if kind == "cuda" else None
    made = Way(torch.device(kind, index), how == "table")
    move: Move | None = move_by_rows if kind == "cpu" else move_on(made.device)
    if move is None:
        pytest.skip("no Triton")

    def watched(
        table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, alone: bool = False
    ) -> None:
        made.moves.append(table)
        move(table, slot, into_slot=into_slot, alone=alone)

    monkeypatch.setattr(scatter, "move_on", lambda device: watched if made.by_table else None)
    return made


class FromFiles:
    """A source without threads: the files' bytes, and the trailer."""

    def __init__(self, ring: Ring, contents: Sequence[bytes]) -> None:
        self._ring = ring
        self._contents = contents

    def fill(self, chunk: Chunk, slot: Slot) -> None:
        memory = torch.zeros(chunk.wire_nbytes, dtype=torch.uint8)
        view, at, digests = host_view(memory), 0, b""
        for extent in chunk.extents:
            data = self._contents[extent.file][extent.offset : extent.offset + extent.nbytes]
            view[at : at + extent.nbytes] = data
            digests += digests_of(data)
            at += extent.nbytes
        write_trailer(view[chunk.trailer_offset :], TAG, chunk, digests)
        with self._ring.fill:
            slot.memory[: chunk.wire_nbytes].copy_(memory)
            slot.filled = self._ring.fill.record()

    def close(self) -> None: ...


@dataclass
class Run:
    """A checkpoint on its way from a rank to itself."""

    path: Path
    way: Way
    buffer_size: int = MIB
    num_buffers: int = 2
    num_landed: int = 0
    damaged: int | None = None  # the chunk that is, on the way

    def __post_init__(self) -> None:
        files = outgoing_files(open_checkpoint(self.path))
        self.specs = [file.spec for file in files]
        self.chunks = plan_chunks([spec.nbytes for spec in self.specs], self.buffer_size, (0,))
        root = self.path if self.path.is_dir() else self.path.parent
        self.contents = [(root / spec.name).read_bytes() for spec in self.specs]

    def into(
        self, destination: TensorDestination, before: Callable[[TensorSink], object] = id
    ) -> TensorSink:
        """Land on the destination; `before` is called when all is ready and no byte has moved."""
        size = slot_nbytes(self.buffer_size)
        ring = Ring(self.way.device, size, self.num_buffers, Counters())
        ring.overwrite(POISON)
        buffers = Buffers(ring, self.buffer_size, 0, TAG)
        sink = TensorSink(self.specs, destination)
        sink.prepare()
        landing = DeviceLanding(sink, self.specs, self.chunks, buffers)
        before(sink)

        def broadcast(tensor: torch.Tensor, root: int) -> None:
            if self.num_landed == self.damaged:
                tensor[0] ^= 1
            self.num_landed += 1

        run_pipeline(
            self.chunks,
            rank=0,
            ring=ring,
            broadcast=broadcast,
            source=ChecksummedSource(FromFiles(ring, self.contents), buffers),
            drain=landing,
        )
        sink.finish()
        want = [digests_of(content) for content in self.contents]
        assert landing.digests().of_blocks() == want
        return sink


def begins_of(run: Run) -> dict[str, int]:
    """The chunk that brings each tensor's first byte, or the byte before an empty one."""
    return chunks_of(run, lambda tensor: tensor.begin - (not tensor.nbytes))


def ends_of(run: Run) -> dict[str, int]:
    """The chunk that brings each tensor's last byte, or the byte before an empty one."""
    return chunks_of(run, lambda tensor: tensor.end - 1)


def chunks_of(run: Run, byte: Callable[[Tensor], int]) -> dict[str, int]:
    """The chunk of one byte of each tensor, by its block."""
    blocks = {
        (extent.file, offset // plan.BLOCK): chunk.index
        for chunk in run.chunks
        for extent in chunk.extents
        for offset in range(extent.offset, extent.offset + extent.nbytes, plan.BLOCK)
    }
    return {
        tensor.name: blocks[file, byte(tensor) // plan.BLOCK]
        for file, spec in enumerate(run.specs)
        for tensor in (spec.header.tensors if spec.header else ())
    }


class Ordered(Kept):
    """Remembers in which order the tensors came, and after which broadcast."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self.came_after: dict[str, int] = {}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        super().put(name, tensor)
        self.came_after[name] = self._run.num_landed


def oracle(path: Path) -> Tensors:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: value for file in files for name, value in load_file(file).items()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().flatten().view(torch.uint8)


def assert_same(got: Mapping[str, torch.Tensor], want: Tensors) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(as_bytes(got[name]), as_bytes(tensor)), name


def poisoned(want: Tensors, device: torch.device) -> Tensors:
    """Tensors of the same looks whose bytes are all wrong."""
    made = {}
    for name, tensor in want.items():
        data = (as_bytes(tensor) ^ POISON).view(tensor.dtype).view(tensor.shape)
        made[name] = data.to(device)
    return made


def mixed(folder: Path) -> Path:
    """Every dtype, empty and 0-dim ones, odd places, several that lie across chunks, and files
    that take turns."""
    write_safetensors(folder / "a.safetensors", every_torch_dtype(), pad=1, seed=1)
    write_safetensors(
        folder / "b.safetensors",
        {
            "first": ("U8", (0,)),
            "wide": ("U8", (3 * MIB + 1,)),
            "between": ("F32", (0, 3)),
            "askew": ("BF16", (400_001,)),
            "one": ("F64", ()),
            "last": ("I8", (0,)),
        },
        pad=3,
        seed=2,
    )
    for name in "cd":  # large enough to take turns of a MiB
        sizes = {f"{name}.{i}": ("U8", (MIB + i + 5,)) for i in range(4)}
        write_safetensors(folder / f"{name}.safetensors", sizes, seed=ord(name))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def small_ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 tensors, at offsets of all kinds."""
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 600, (10_000,), generator=generator).tolist()
    data = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, generator=generator)
    tensors = {f"t.{i}": part for i, part in enumerate(data.split(sizes))}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("buffer_size", "num_buffers"), [(MIB, 1), (2 * MIB, 3), (64 * MIB, 2)])
def test_every_byte_lands_in_tensors_that_are_there(
    checkpoint: Path, way: Way, buffer_size: int, num_buffers: int
) -> None:
    want = oracle(checkpoint)
    into = poisoned(want, way.device)
    run = Run(checkpoint, way, buffer_size, num_buffers)
    sink = run.into(GivenTensors(way.device, into, strict=True))
    assert_same(into, want)
    assert sink.result() == {"sink": "tensors", "tensors": len(want)}


@pytest.mark.parametrize(("buffer_size", "num_buffers"), [(MIB, 1), (2 * MIB, 3), (64 * MIB, 2)])
def test_every_new_tensor_is_given_once_as_soon_as_it_is_whole(
    checkpoint: Path, way: Way, buffer_size: int, num_buffers: int
) -> None:
    run = Run(checkpoint, way, buffer_size, num_buffers)
    kept = Ordered(run)
    sink = run.into(NewTensors(way.device, kept))
    assert_same(kept, oracle(checkpoint))
    assert sink.result() == {"sink": "tensors", "tensors": len(kept)}
    # Never before its last byte has come, and in the order in which they end.
    ends = ends_of(run)
    assert all(kept.came_after[name] > ends[name] for name in ends)
    assert [ends[name] for name in kept] == sorted(ends.values())


def test_only_wanted_ones_are_touched_and_those_that_lie_badly_are_right_too(
    checkpoint: Path, way: Way
) -> None:
    want = {name: tensor for name, tensor in oracle(checkpoint).items() if name[0] != "c"}
    turned = torch.full((2, 400_001), 7.0, dtype=torch.bfloat16, device=way.device).t()
    into = poisoned(want, way.device) | {"askew": turned[:, 0], "unknown": torch.ones(3)}
    Run(checkpoint, way).into(GivenTensors(way.device, into, strict=False))
    assert torch.equal(into.pop("unknown"), torch.ones(3))
    assert_same(into, want)
    assert (turned[:, 1] == 7).all()  # what lies between its elements


class Watched(GivenTensors):
    """Counts every word about a tensor once all is ready."""

    def __init__(self, device: torch.device, tensors: Tensors) -> None:
        super().__init__(device, tensors, strict=True)
        self.calls: list[str] = []

    def wants(self, tensor: Tensor) -> bool:
        self.calls.append("wants")
        return super().wants(tensor)

    def own_memory_of(self, tensor: Tensor) -> torch.Tensor | None:
        self.calls.append("own_memory_of")
        return super().own_memory_of(tensor)

    def make(self, tensors: Sequence[Tensor]) -> list[torch.Tensor]:
        self.calls.append("make")
        return super().make(tensors)

    def complete(self, tensor: Tensor, memory: torch.Tensor) -> None:
        self.calls.append("complete")
        super().complete(tensor, memory)


def chunks_with_tensors(run: Run) -> int:
    """The first ones may be the header's alone."""
    return len(set(begins_of(run).values()))


def test_nobody_looks_at_a_tensor_that_is_there_while_bytes_move(
    small_ones: Path, way: Way
) -> None:
    if not way.by_table:
        pytest.skip("plain copies are one for each")
    want = oracle(small_ones)
    into = poisoned(want, way.device)
    destination = Watched(way.device, into)
    run = Run(small_ones, way)
    run.into(destination, before=lambda sink: destination.calls.clear())
    assert destination.calls == []
    assert len(way.moves) == chunks_with_tensors(run)
    # Tables that were made at once, and lie in one piece.
    assert len({table.untyped_storage().data_ptr() for table in way.moves}) == 1
    assert_same(into, want)


def test_new_tensors_are_made_together_chunk_by_chunk(small_ones: Path, way: Way) -> None:
    run = Run(small_ones, way)
    kept = Ordered(run)
    counts: list[int] = []

    class Counted(NewTensors):
        def make(self, tensors: Sequence[Tensor]) -> list[torch.Tensor]:
            counts.append(len(tensors))
            return super().make(tensors)

    run.into(Counted(way.device, kept), before=lambda sink: counts.append(0))
    assert counts[0] == 0  # none before the first byte
    assert len(counts) == 1 + chunks_with_tensors(run)
    assert sum(counts) == 10_000
    assert len(way.moves) == (chunks_with_tensors(run) if way.by_table else 0)
    assert_same(kept, oracle(small_ones))


def test_chunks_without_tensors_and_without_wanted_ones_cost_no_copy(
    tmp_path: Path, way: Way
) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 5000)
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (3,)), "x": ("U8", (2 * MIB,))})
    into = {"w": torch.zeros(3, dtype=torch.uint8, device=way.device)}
    run = Run(tmp_path, way)
    run.into(GivenTensors(way.device, into, strict=False))
    assert_same(into, {"w": oracle(tmp_path)["w"]})
    assert len(way.moves) == int(way.by_table)
    assert len(run.chunks) > 1


def test_no_memory_is_made_after_an_abort(checkpoint: Path, way: Way) -> None:
    run = Run(checkpoint, way)
    sinks: list[TensorSink] = []
    made: list[str] = []

    class Aborting(NewTensors):
        def make(self, tensors: Sequence[Tensor]) -> list[torch.Tensor]:
            made.extend(tensor.name for tensor in tensors)
            sinks[0].abort()
            return super().make(tensors)

    with pytest.raises(TransferError, match="the transfer is over"):
        run.into(Aborting(way.device, Ordered(run)), before=sinks.append)
    assert run.num_landed == 1
    assert set(made) == {name for name, chunk in begins_of(run).items() if chunk == 0}


def test_what_a_failed_transfer_may_still_write_to_is_told_to_be_in_use(
    checkpoint: Path, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where copies may be under way when the tensors, or their tables, are dropped."""
    held: set[int] = set()
    record = torch.Tensor.record_stream

    def watched(tensor: torch.Tensor, stream: torch.Stream) -> None:
        held.add(tensor.untyped_storage().data_ptr())
        record(tensor, stream)

    monkeypatch.setattr(torch.Tensor, "record_stream", watched)
    run = Run(checkpoint, way, damaged=3)
    into = poisoned(oracle(checkpoint), way.device)
    with pytest.raises(TransferError, match="damaged in transit, chunk 3"):
        run.into(GivenTensors(way.device, into, strict=True))
    in_use = {tensor.data_ptr() for tensor in into.values() if tensor.numel()}
    in_use |= {table.untyped_storage().data_ptr() for table in way.moves}
    assert in_use <= held if way.device.type == "cuda" else not held


def test_what_has_landed_needs_no_event_when_it_is_freed(
    checkpoint: Path, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensor: torch.Tensor, stream: torch.Stream) -> None:
        raise AssertionError("all of it is over before a tensor is given")

    monkeypatch.setattr(torch.Tensor, "record_stream", refuse)
    run = Run(checkpoint, way)
    kept = Ordered(run)
    run.into(NewTensors(way.device, kept))
    assert_same(kept, oracle(checkpoint))
