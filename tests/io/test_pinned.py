"""Pinned memory: exact in size, all there, given back once nobody can be using it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import outgoing_files
from packcast.errors import TransferError
from packcast.io import pinned, unit_runner
from packcast.io import source as source_module
from packcast.io.pinned import PinnedMemory
from packcast.io.source import FileReader, FileSource
from packcast.packed.plan import BLOCK, PAGE, plan_chunks
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.commands import eventually
from tests.io.alone import make_buffers
from tests.io.cuda import Cudart
from tests.io.pools import Gate, no_thread_left


def test_it_is_whole_pages_and_all_of_them_are_there_from_the_start(
    cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    for advice in (23, 12345):  # and one that no kernel knows
        monkeypatch.setattr(pinned, "_MADV_POPULATE_WRITE", advice)
        memory = PinnedMemory(300 * PAGE + 1)
        assert memory.nbytes == memory.tensor.numel() == 301 * PAGE
        assert memory.address == memory.tensor.data_ptr()
        assert resident_nbytes(memory.address) >= memory.nbytes
        assert cudart.pinned == [memory.address]
        memory.close(is_idle=True)
        assert cudart.pinned == []


def resident_nbytes(address: int) -> int:
    """Of the mapping that the address is in."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        begin, dash, end = line.split()[0].partition("-")
        if dash and int(begin, 16) <= address < int(end, 16):
            rss = next(line for line in lines if line.startswith("Rss:"))
            return int(rss.split()[1]) * 1024
    return 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_that_cannot_be_pinned_is_an_error_with_a_way_out() -> None:
    with pytest.raises(TransferError, match=r"cannot pin 2\.0 MiB") as caught:
        PinnedMemory(2 * BLOCK)
    assert "--staging" in str(caught.value.hint)


def test_memory_that_the_host_does_not_have_is_an_error_with_a_way_out(cudart: Cudart) -> None:
    with pytest.raises(TransferError, match="cannot pin"):
        PinnedMemory(1 << 60)
    assert cudart.pinned == []


def test_what_a_stuck_copy_may_use_is_unpinned_when_it_is_closed_again_later(
    cudart: Cudart,
) -> None:
    memory = PinnedMemory(PAGE)
    for _ in range(2):
        memory.close(is_idle=False)
    assert cudart.pinned == [memory.address]
    tensor = weakref.ref(memory.tensor)
    for _ in range(2):
        memory.close(is_idle=True)
    assert cudart.pinned == []
    del memory
    gc.collect()
    assert tensor() is None


def test_what_nobody_closes_again_stays_mapped(cudart: Cudart) -> None:
    memory = PinnedMemory(PAGE)
    memory.close(is_idle=False)
    tensor = weakref.ref(memory.tensor)
    del memory
    gc.collect()
    assert tensor() is not None


def test_staging_stays_pinned_while_an_io_thread_is_stuck_in_a_read_into_it(
    tmp_path: Path, cudart: Cudart, held_reads: Callable[[int], Gate]
) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (3 * BLOCK,))})
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    files = outgoing_files(checkpoint)
    chunks = plan_chunks([files[0].spec.nbytes], BLOCK, [0])
    gate = held_reads(BLOCK)
    with no_thread_left():
        buffers = make_buffers(BLOCK, 2, staging_nbytes=4 * BLOCK)
        source = FileSource(chunks, FileReader(files, checkpoint.files), buffers, num_threads=2)
        source.read_ahead()
        gate.await_reached()
        closing = threading.Thread(target=source.close)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()
        assert len(cudart.pinned) == 1
        gate.open()
        eventually(lambda: source.close() or not cudart.pinned, "the end of the stuck read")


@pytest.mark.parametrize("what", ["spans", "start_pool", "make_copies"])
def test_staging_of_an_end_that_cannot_be_made_is_unpinned(
    tmp_path: Path, cudart: Cudart, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (3 * BLOCK,))})
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    files = outgoing_files(checkpoint)
    chunks = plan_chunks([files[0].spec.nbytes], BLOCK, [0])
    reader = FileReader(files, checkpoint.files)

    def fail(*_: object) -> None:
        assert len(cudart.pinned) == 1
        raise TransferError("no room")

    owner = {"spans": reader, "start_pool": unit_runner, "make_copies": source_module}[what]
    monkeypatch.setattr(owner, what, fail)
    with no_thread_left(), pytest.raises(TransferError, match="no room"):
        FileSource(chunks, reader, make_buffers(BLOCK, 2, staging_nbytes=4 * BLOCK), num_threads=2)
    assert cudart.pinned == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestBesideAGpu:
    """With CUDA's own runtime."""

    def test_it_is_pinned_and_copies_both_ways_do_not_wait(self) -> None:
        nbytes = 64 << 20
        memory = PinnedMemory(nbytes)
        assert memory.tensor.is_pinned()
        memory.tensor.random_(0, 256)
        expected = memory.tensor.clone()
        there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        there.copy_(memory.tensor, non_blocking=True)
        torch.cuda.synchronize()
        memory.tensor.fill_(0xA5)
        memory.tensor.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(memory.tensor, expected)
        memory.close(is_idle=True)

    def test_the_same_memory_can_be_pinned_again_and_again(self) -> None:
        for _ in range(20):
            memory = PinnedMemory(16 << 20)
            memory.close(is_idle=True)
            assert not memory.tensor.is_pinned()
            del memory

    def test_memory_that_cannot_be_pinned_spoils_nothing_that_comes_after(self) -> None:
        memory = PinnedMemory(PAGE)
        with pytest.raises(RuntimeError, match="cudaHostRegister failed"):
            pinned._register(memory.tensor)  # it is already
        assert int(torch.ones(7, device="cuda").sum()) == 7
        memory.close(is_idle=True)
