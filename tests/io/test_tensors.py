"""Tensors on a CPU: I/O threads copy out of the slots into them, new ones or the caller's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.tensor_table import Tensor
from packcast.errors import TransferError
from packcast.io.sinks.tensor_destination import GivenTensors, NewTensors, TensorDestination
from packcast.io.sinks.tensors import TensorSink
from packcast.packed.checksum import SlotChecksums
from tests.helpers.checkpoints import sharded, write_safetensors
from tests.helpers.dtypes import every_torch_dtype
from tests.io.alone import Kept, run_alone, specs_of
from tests.io.pools import no_thread_left

CPU = torch.device("cpu")
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("pool")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    write_safetensors(tmp_path / "c" / "a.safetensors", every_torch_dtype(), pad=1)
    sharded(tmp_path / "c" / "more", 2, 5 * MIB)
    return open_checkpoint(tmp_path / "c")


def content(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """NaNs are equal to themselves here."""
    as_bytes = tensor.contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(as_bytes.tolist())


def expected(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    files = [file.path for file in checkpoint.files if file.header]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def receive(
    checkpoint: Checkpoint, destination: TensorDestination, buffer_mib: int = 1
) -> TensorSink:
    sink = TensorSink(specs_of(checkpoint), destination)
    sink.prepare()
    with no_thread_left():
        run_alone(checkpoint, sink, buffer_size=buffer_mib * MIB)
    sink.finish()
    return sink


@pytest.mark.parametrize("buffer_mib", [1, 3, 64])
def test_every_tensor_is_given_once_with_the_files_bytes(
    checkpoint: Checkpoint, buffer_mib: int
) -> None:
    kept = Kept()
    sink = receive(checkpoint, NewTensors(CPU, kept), buffer_mib)
    wanted = expected(checkpoint)
    assert set(kept) == set(wanted)
    for name, tensor in wanted.items():
        assert content(kept[name]) == content(tensor), name
    assert sink.result() == {"sink": "tensors", "tensors": len(wanted)}


def test_the_callers_tensors_are_filled_in_place_also_those_that_are_not_contiguous(
    checkpoint: Checkpoint,
) -> None:
    wanted = expected(checkpoint)
    into = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    into["all.F16"] = torch.empty(into["all.F16"].shape[::-1], dtype=torch.float16).t()
    assert not into["all.F16"].is_contiguous()
    where = {name: tensor.data_ptr() for name, tensor in into.items()}
    receive(checkpoint, GivenTensors(CPU, into, strict=True))
    for name, tensor in wanted.items():
        assert content(into[name]) == content(tensor), name
        assert into[name].data_ptr() == where[name]


def test_unwanted_tensors_are_dropped_and_the_others_are_whole(
    checkpoint: Checkpoint,
) -> None:
    wanted = expected(checkpoint)
    into = {name: torch.empty_like(tensor) for name, tensor in list(wanted.items())[::3]}
    into["mine"] = torch.full((4,), 7)
    receive(checkpoint, GivenTensors(CPU, into, strict=False))
    assert into.pop("mine").tolist() == [7] * 4
    for name, tensor in into.items():
        assert content(tensor) == content(wanted[name]), name


def test_a_tensor_with_a_damaged_block_is_not_given(tmp_path: Path) -> None:
    tensors = {"first": ("U8", (1000,)), "second": ("U8", (3 * MIB,))}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    seen: list[int] = []
    kept = Kept()

    def damage(tensor: torch.Tensor) -> None:
        seen.append(len(seen))
        if len(seen) == 3:
            tensor[5] ^= 1

    sink = TensorSink(specs_of(checkpoint), NewTensors(CPU, kept))
    sink.prepare()
    with pytest.raises(TransferError, match=r"\(tensor second\) were damaged in transit, chunk 2"):
        run_alone(checkpoint, sink, spoil=damage)
    sink.abort()
    assert "second" not in kept


# -- memory ---------------------------------------------------------------------------------------


def tensor(name: str, kib: int) -> Tensor:
    return Tensor(name, "U8", (kib, 1024), 0, kib * 1024)


def test_the_peak_is_of_tensors_that_are_not_whole_at_one_time() -> None:
    destination = NewTensors(CPU, Kept())
    assert destination.peak_nbytes == 0
    one, two, three = tensor("one", 3), tensor("two", 4), tensor("three", 2)
    first, second = destination.make([one, two])
    destination.complete(one, first)
    destination.complete(two, second)
    destination.complete(three, *destination.make([three]))
    assert destination.peak_nbytes == 7 * 1024


def test_the_callers_own_tensors_do_not_count_but_what_is_received_beside_them_does() -> None:
    plain, turned = (
        torch.empty(4, 1024, dtype=torch.uint8),
        torch.empty(1024, 3, dtype=torch.uint8).t(),
    )
    destination = GivenTensors(CPU, {"plain": plain, "turned": turned}, strict=True)
    for one in (tensor("plain", 4), tensor("turned", 3)):
        own = destination.own_memory_of(one)
        assert (own is None) == (one.name == "turned")
        destination.complete(one, *destination.make([one]) if own is None else [own])
    assert destination.peak_nbytes == 3 * 1024


def test_the_tables_of_sums_are_as_large_as_they_say() -> None:
    # Without the kernel: multipliers and products of 4 MiB in words, and of 16 groups.
    assert SlotChecksums(CPU, bytes(16), 64 << 20).nbytes == 2 * (8 << 20) + 2 * 8 * 16
