"""Shelves count the memory that they make, since the rest of the process has memory of its own."""

from __future__ import annotations

import torch

from packcast.checkpoint.tensor_table import Tensor
from packcast.io.sinks.tensor_destination import GivenTensors, NewTensors
from packcast.packed.checksum import SlotChecksums

CPU = torch.device("cpu")
KIB = 1024


def tensor(name: str, kib: int) -> Tensor:
    return Tensor(name, "U8", (kib, KIB), 0, kib * KIB)


class Taker:
    def put(self, name: str, tensor: torch.Tensor) -> None: ...
    def finish(self) -> None: ...
    def stop(self) -> None: ...


def test_the_peak_is_of_tensors_that_are_not_whole_at_one_time() -> None:
    destination = NewTensors(CPU, Taker())
    assert destination.peak_nbytes == 0
    one, two, three = tensor("one", 3), tensor("two", 4), tensor("three", 2)
    first, second = destination.make([one, two])
    destination.complete(one, first)
    destination.complete(two, second)
    destination.complete(three, *destination.make([three]))
    assert destination.peak_nbytes == 7 * KIB


def test_the_callers_own_tensors_do_not_count_but_what_is_received_beside_them_does() -> None:
    plain, turned = (
        torch.empty(4, KIB, dtype=torch.uint8),
        torch.empty(KIB, 3, dtype=torch.uint8).t(),
    )
    destination = GivenTensors(CPU, {"plain": plain, "turned": turned}, strict=True)
    for one in (tensor("plain", 4), tensor("turned", 3)):
        own = destination.own_memory_of(one)
        assert (own is None) == (one.name == "turned")
        destination.complete(one, *destination.make([one]) if own is None else [own])
    assert destination.peak_nbytes == 3 * KIB


def test_the_tables_of_sums_are_as_large_as_they_say() -> None:
    # Without the kernel: multipliers and products of 4 MiB in words, and of 16 groups.
    assert SlotChecksums(CPU, bytes(16), 64 << 20).nbytes == 2 * (8 << 20) + 2 * 8 * 16
