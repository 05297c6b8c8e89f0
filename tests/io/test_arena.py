"""The arena: memory that other processes can map, exact in size, given back at the end."""

from __future__ import annotations

import gc
import mmap
import os
import random
import weakref
from pathlib import Path

import pytest
import torch

from packcast.errors import TransferError
from packcast.io import arena as arenas
from packcast.io.pinned import Arena
from packcast.packed.plan import PAGE
from tests.helpers.processes import num_descriptors


def test_tensor_view_and_descriptor_are_one_memory() -> None:
    arena = Arena(3 * PAGE, is_pinned=False)
    data = random.Random(0).randbytes(3 * PAGE)
    arena.view[:] = data
    assert bytes(arena.tensor.numpy()) == data
    assert arena.address == arena.tensor.data_ptr()
    with mmap.mmap(arena.fd, 3 * PAGE) as elsewhere:
        assert elsewhere[:] == data
        elsewhere[PAGE] = 7 ^ data[PAGE]
    assert arena.tensor[PAGE] == 7 ^ data[PAGE]
    arena.close(is_idle=True)


def test_it_is_whole_pages_and_only_pinned_memory_counts_as_pinned() -> None:
    arena = Arena(PAGE + 1, is_pinned=False)
    assert (arena.nbytes, arena.tensor.numel(), arena.pinned_nbytes) == (2 * PAGE, 2 * PAGE, 0)
    arena.close(is_idle=True)


def test_every_page_is_there_from_the_start() -> None:
    nbytes = 64 * PAGE
    arena = Arena(nbytes, is_pinned=False)
    assert os.fstat(arena.fd).st_blocks * 512 >= nbytes
    arena.close(is_idle=True)


def test_an_older_kernel_has_every_page_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "_MADV_POPULATE_WRITE", 12345)  # advice that no kernel knows
    arena = Arena(64 * PAGE, is_pinned=False)
    assert os.fstat(arena.fd).st_blocks * 512 >= 64 * PAGE
    arena.close(is_idle=True)


def test_views_outlive_it_and_the_mapping_goes_with_the_last_of_them() -> None:
    gc.collect()
    num_before = _num_mappings()  # of tests before this one, whose errors are kept
    arena = Arena(PAGE, is_pinned=False)
    tensor, view = arena.tensor[100:200], arena.view[100:200]
    arena.tensor.fill_(9)
    arena.close(is_idle=True)
    arena.close(is_idle=True)
    del arena
    gc.collect()
    assert int(tensor.sum()) == 900
    assert set(view) == {9}
    assert _num_mappings() == num_before + 1
    del tensor, view
    gc.collect()
    assert _num_mappings() == num_before


def test_memory_that_the_host_does_not_have_is_an_error_with_a_way_out() -> None:
    num_before = num_descriptors()
    with pytest.raises(TransferError, match="cannot share") as caught:
        Arena(1 << 60, is_pinned=False)
    assert "--staging" in str(caught.value.hint)
    del caught
    assert num_descriptors() == num_before


class Cudart:
    """Pins and unpins, as CUDA's runtime; knows what is pinned."""

    def __init__(self) -> None:
        self.pinned: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0


def test_what_a_stuck_copy_may_use_is_unpinned_when_it_is_closed_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    arena = Arena(PAGE, is_pinned=True)
    assert cudart.pinned == [arena.address]
    for _ in range(2):
        arena.close(is_idle=False)
    assert cudart.pinned == [arena.address]
    tensor = weakref.ref(arena.tensor)
    for _ in range(2):
        arena.close(is_idle=True)
    assert cudart.pinned == []
    del arena
    gc.collect()
    assert tensor() is None


def _num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:packcast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestPinned:
    """Beside a GPU."""

    def test_it_is_pinned_and_copies_both_ways_do_not_wait(self) -> None:
        nbytes = 64 << 20
        arena = Arena(nbytes, is_pinned=True)
        assert arena.tensor.is_pinned()
        assert arena.pinned_nbytes == nbytes
        arena.tensor.random_(0, 256)
        expected = arena.tensor.clone()
        there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        there.copy_(arena.tensor, non_blocking=True)
        torch.cuda.synchronize()
        arena.tensor.fill_(0xA5)
        arena.tensor.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(arena.tensor, expected)
        arena.close(is_idle=True)

    def test_the_same_memory_can_be_pinned_again_and_again(self) -> None:
        for _ in range(20):
            arena = Arena(16 << 20, is_pinned=True)
            arena.close(is_idle=True)
            assert not arena.tensor.is_pinned()
            del arena

    def test_what_a_stuck_copy_may_use_stays_pinned_and_mapped(self) -> None:
        arena = Arena(PAGE, is_pinned=True)
        tensor = arena.tensor
        arena.close(is_idle=False)
        del arena
        gc.collect()
        assert tensor.is_pinned()

    def test_memory_that_cannot_be_pinned_spoils_nothing_that_comes_after(self) -> None:
        arena = Arena(PAGE, is_pinned=True)
        with pytest.raises(RuntimeError, match="cudaHostRegister failed"):
            arenas._register(arena.tensor)  # it is already
        assert int(torch.ones(7, device="cuda").sum()) == 7
        arena.close(is_idle=True)
