"""Shelves count the memory that they make, since the rest of the process has memory of its own."""

from __future__ import annotations

import torch

from packcast.checkpoint.tensors import Tensor
from packcast.io.sinks.shelf import GivenTensors, NewTensors
from packcast.packed.sums import SlotSums

CPU = torch.device("cpu")
KIB = 1024


def tensor(name: str, kib: int) -> Tensor:
    return Tensor(name, "U8", (kib, KIB), 0, kib * KIB)


class Taker:
    def put(self, name: str, tensor: torch.Tensor) -> None: ...
    def finish(self) -> None: ...
    def stop(self) -> None: ...


def test_the_peak_is_of_tensors_that_are_not_whole_at_one_time() -> None:
    shelf = NewTensors(CPU, Taker())
    assert shelf.peak_nbytes == 0
    one, two, three = tensor("one", 3), tensor("two", 4), tensor("three", 2)
    first, second = shelf.make([one, two])
    shelf.complete(one, first)
    shelf.complete(two, second)
    shelf.complete(three, *shelf.make([three]))
    assert shelf.peak_nbytes == 7 * KIB


def test_the_callers_own_tensors_do_not_count_but_what_is_received_beside_them_does() -> None:
    plain, turned = (
        torch.empty(4, KIB, dtype=torch.uint8),
        torch.empty(KIB, 3, dtype=torch.uint8).t(),
    )
    shelf = GivenTensors(CPU, {"plain": plain, "turned": turned}, strict=True)
    for one in (tensor("plain", 4), tensor("turned", 3)):
        own = shelf.own_memory_of(one)
        assert (own is None) == (one.name == "turned")
        shelf.complete(one, *shelf.make([one]) if own is None else [own])
    assert shelf.peak_nbytes == 3 * KIB


def test_the_tables_of_sums_are_as_large_as_they_say() -> None:
    # Without the kernel: multipliers and products of 4 MiB in words, and of 16 groups.
    assert SlotSums(CPU, bytes(16), 64 << 20).nbytes == 2 * (8 << 20) + 2 * 8 * 16
