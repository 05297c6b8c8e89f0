"""Slots to tensors without the host: the consumer's end of a GPU, run on ranks over gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.errors import TransferError
from packcast.io.checksummed import ChecksummedSource
from packcast.io.device_landing import DeviceLanding
from packcast.io.digests import BlockDigests
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.tensor_destination import NewTensors
from packcast.io.sinks.tensors import TensorSink
from packcast.io.source import FileReader, FileSource
from packcast.io.staging import Buffers
from packcast.packed.counters import Counters
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import DIGEST_NBYTES, PAGE, plan_chunks, slot_nbytes
from packcast.packed.ring import Broadcast, Ring
from packcast.packed.trailer import transfer_tag
from tests.helpers.checkpoints import sharded, write_safetensors
from tests.helpers.dtypes import every_torch_dtype
from tests.helpers.ranks import run_ranks
from tests.io.alone import Kept
from tests.io.sinks import digests_of

MIB = 1 << 20
TAG = transfer_tag("test")


def send(
    path: Path,
    *,
    readers: int = 1,
    workers: int = 1,
    buffer_size: int = MIB,
    num_buffers: int = 2,
    spoil: Callable[[int, torch.Tensor], object] = lambda rank, tensor: None,
    with_sums: bool = True,
    dropped: bool = False,
    tolerant: bool = False,
) -> tuple[list[Kept], list[BlockDigests]]:
    """What each worker was given, and its digests; the first ranks only read."""
    checkpoint = open_checkpoint(path)
    files = outgoing_files(checkpoint)
    specs = [file.spec for file in files]
    chunks = plan_chunks([spec.nbytes for spec in specs], buffer_size, range(readers))

    def rank_body(rank: int, broadcast: Broadcast) -> tuple[Kept, BlockDigests]:
        ring = Ring(torch.device("cpu"), slot_nbytes(buffer_size), num_buffers, Counters())
        buffers = Buffers(ring, buffer_size, 0, TAG)
        source = drain = None
        kept = Kept()
        if rank < readers:
            mine = [chunk for chunk in chunks if chunk.root == rank]
            reading = FileSource(mine, FileReader(files, checkpoint.files), buffers, num_threads=2)
            source = ChecksummedSource(reading, buffers) if with_sums else reading
        else:
            tensors = TensorSink(specs, NewTensors(ring.device, kept))
            sink = DiscardSink() if dropped else tensors
            sink.prepare()
            drain = DeviceLanding(sink, specs, chunks, buffers, tolerant=tolerant)

        def spoiled(tensor: torch.Tensor, root: int) -> None:
            broadcast(tensor, root)
            spoil(rank, tensor)

        run_pipeline(chunks, rank=rank, ring=ring, broadcast=spoiled, source=source, drain=drain)
        return kept, drain.digests() if drain else BlockDigests([])

    outcomes = run_ranks(readers + workers, rank_body, 30)[readers:]
    return [kept for kept, _ in outcomes], [digests for _, digests in outcomes]


@pytest.mark.parametrize(
    ("readers", "workers", "buffer_size", "num_buffers"),
    [(1, 1, MIB, 1), (1, 2, MIB, 2), (2, 1, 2 * MIB, 3), (3, 1, 64 * MIB, 2)],
)
def test_every_tensor_is_given_once_with_the_files_bytes(
    tmp_path: Path, readers: int, workers: int, buffer_size: int, num_buffers: int
) -> None:
    write_safetensors(tmp_path / "c" / "a.safetensors", every_torch_dtype(), pad=1)
    sharded(tmp_path / "c" / "more", 2, 2 * MIB)
    all_given, digests = send(
        tmp_path / "c",
        readers=readers,
        workers=workers,
        buffer_size=buffer_size,
        num_buffers=num_buffers,
    )
    want = []
    for file in open_checkpoint(tmp_path / "c").files:
        data = file.path.read_bytes()
        for tensor in file.header.tensors if file.header else ():
            want.append((tensor.name, tensor.shape, data[tensor.begin : tensor.end]))
    for given in all_given:
        got = [
            (name, tuple(tensor.shape), bytes(tensor.flatten().view(torch.uint8).tolist()))
            for name, tensor in given.items()
        ]
        assert sorted(got) == sorted(want)
    assert all(found.of_files() == digests[0].of_files() for found in digests)


def flip(byte: int, bit: int, chunk: int) -> Callable[[int, torch.Tensor], None]:
    """Damage on the way to rank 1; a negative byte counts from the end."""
    seen: list[int] = []

    def spoil(rank: int, tensor: torch.Tensor) -> None:
        if rank == 1:
            seen.append(tensor.numel())
            if len(seen) == chunk + 1:
                tensor[byte] ^= bit

    return spoil


# In the last chunk each time: after an earlier one nobody would tell the sender, who would wait.
@pytest.mark.parametrize(
    ("nbytes", "spoil", "says"),
    [
        (900_000, flip(500_001, 0x80, chunk=0), "m.safetensors: bytes from 0 were damaged.*k 0"),
        (3_000_000, flip(3, 1, chunk=2), "m.safetensors: bytes from 2097152 were damaged.*k 2"),
        (2_000_000, flip(8 - PAGE, 1, chunk=1), "chunk 1 is not of this transfer"),
        (2_000_000, flip(70 - PAGE, 1, chunk=1), "bytes from 1048576 were damaged"),
        (2_000_000, flip(81 - PAGE, 1, chunk=1), "trailer of chunk 1 was damaged"),
    ],
)
def test_damage_on_the_way_is_found_before_the_tensor_is_given(
    tmp_path: Path, nbytes: int, spoil: Callable[[int, torch.Tensor], None], says: str
) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (nbytes,))})
    with pytest.raises(TransferError, match=says):
        send(tmp_path, spoil=spoil)


def test_what_is_dropped_is_proven_all_the_same(tmp_path: Path) -> None:
    sharded(tmp_path / "c", 2, 3 * MIB)
    _, (found,) = send(tmp_path / "c", dropped=True)
    assert found.of_blocks() == [
        digests_of(file.path.read_bytes()) for file in open_checkpoint(tmp_path / "c").files
    ]
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (3_000_000,))})
    with pytest.raises(TransferError, match="bytes from 2097152 were damaged"):
        send(tmp_path / "m.safetensors", dropped=True, spoil=flip(3, 1, chunk=2))


@pytest.mark.parametrize("byte", [500_001, 8 - PAGE])
def test_a_tolerant_one_goes_on_without_the_digests_of_the_damaged_chunk(
    tmp_path: Path, byte: int
) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": ("U8", (3_000_000,))})
    _, (found,) = send(path, dropped=True, tolerant=True, spoil=flip(byte, 1, chunk=1))
    whole, none = digests_of(path.read_bytes()), bytes(DIGEST_NBYTES)
    (got,) = found.of_blocks()
    assert got == whole[:DIGEST_NBYTES] + none + whole[2 * DIGEST_NBYTES :]


def test_a_chunk_without_a_sum_is_not_believed(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (900_000,))})
    with pytest.raises(TransferError, match="damaged in transit"):
        send(tmp_path, with_sums=False)
