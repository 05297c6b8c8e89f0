"""The sum over a slot: the same wherever it is computed, and different for what accidents do."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from packcast.packed.checksum import SlotChecksums
from packcast.packed.ring import Slot
from packcast.packed.trailer import transfer_tag

MIB = 1 << 20
TAG = transfer_tag("this transfer")


def random_slot(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def sum_of(memory: torch.Tensor, nbytes: int, tag: bytes = TAG, buffer_size: int = 16 * MIB) -> int:
    return sum_by(SlotChecksums(torch.device("cpu"), tag, buffer_size), memory, nbytes)


def sum_by(sums: SlotChecksums, memory: torch.Tensor, nbytes: int) -> int:
    """What it adds to a zero behind the memory."""
    at = -(-memory.numel() // 8) * 8
    slot = Slot(torch.zeros(at + 8, dtype=torch.uint8))
    slot.memory[: memory.numel()] = memory
    sums.add(slot, nbytes, at)
    return int(slot.view(at, 8, torch.int64).item())


def test_what_one_end_adds_the_other_takes_away() -> None:
    nbytes, at = 5 * MIB + 3, 6 * MIB
    slot = Slot(torch.cat([random_slot(at), torch.zeros(8, dtype=torch.uint8)]))
    cpu = torch.device("cpu")
    SlotChecksums(cpu, TAG, 16 * MIB).add(slot, nbytes, at)
    assert slot.view(at, 8, torch.int64).item() != 0
    SlotChecksums(cpu, TAG, 16 * MIB, subtract=True).add(slot, nbytes, at)
    assert slot.view(at, 8, torch.int64).item() == 0


def in_plain_python(memory: torch.Tensor, nbytes: int, tag: bytes) -> int:
    """The sum of one group, by its definition, in integers without a size."""

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
        return z ^ (z >> 31) | 1

    def multiplier(place: int) -> int:
        seed = int.from_bytes(tag[:8], "little")
        return mixed(((place + 1) * 0x9E3779B97F4A7C15 + seed) % (1 << 64))

    data = bytes(memory.tolist())
    words_each = 4 * MIB // 4
    words = (data[at : at + 4] for at in range(0, nbytes, 4))
    total = sum(
        int.from_bytes(word, "little", signed=True) * multiplier(i) for i, word in enumerate(words)
    )
    total = total * multiplier(words_each) % (1 << 64)
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("nbytes", [1, 4, 7, 4096, 10_001])
def test_it_is_what_its_definition_says(nbytes: int) -> None:
    memory = random_slot(12_288)
    assert sum_of(memory, nbytes) == in_plain_python(memory, -(-nbytes // 4) * 4, TAG)


def test_two_rings_of_one_transfer_agree_and_those_of_two_do_not() -> None:
    memory = random_slot(9 * MIB + 5000)
    nbytes = 9 * MIB + 123  # three groups, the last one short
    assert sum_of(memory, nbytes) == sum_of(memory.clone(), nbytes)
    assert sum_of(memory, nbytes) != sum_of(memory, nbytes, transfer_tag("another"))


@pytest.mark.parametrize("buffer_size", [MIB, 16 * MIB])
def test_whatever_happens_to_a_slot_changes_it(buffer_size: int) -> None:
    nbytes = min(buffer_size, 9 * MIB) - 8
    memory = random_slot(nbytes + 4096)
    sums = SlotChecksums(torch.device("cpu"), TAG, buffer_size)
    right = sum_by(sums, memory, nbytes)
    dice = random.Random(1)

    def changed(change: Callable[..., object], *arguments: int) -> bool:
        damaged = memory.clone()
        change(damaged, *arguments)
        assert not torch.equal(damaged, memory)
        return sum_by(sums, damaged, nbytes) != right

    for _ in range(5):
        i, j = (place * 4 for place in dice.sample(range(nbytes // 4), 2))
        assert changed(flip_bit, i, dice.randrange(8)), "a flipped bit"
        # What a sum of plain words, and one of words times small numbers, would miss.
        assert changed(flip_signs, i, j), "two flipped signs"
        assert changed(swap, i, j, 4), "two words that changed places"
    assert changed(swap, 0, nbytes // 8 * 4, 65536), "two stretches that did"
    assert changed(lambda m: m[nbytes // 2 :].zero_()), "a slot that was filled by half"
    if buffer_size > 4 * MIB:
        assert changed(swap, 0, 4 * MIB, 4 * MIB), "two groups that changed places"


def flip_bit(memory: torch.Tensor, i: int, bit: int) -> None:
    memory[i] ^= 1 << bit


def flip_signs(memory: torch.Tensor, i: int, j: int) -> None:
    for at in (i, j):
        memory[at + 3] ^= 0x80


def swap(memory: torch.Tensor, i: int, j: int, nbytes: int) -> None:
    first = memory[i : i + nbytes].clone()
    memory[i : i + nbytes] = memory[j : j + nbytes]
    memory[j : j + nbytes] = first


def test_what_lies_behind_the_last_word_does_not_count() -> None:
    memory = random_slot(8192)
    right = sum_of(memory, 4096)
    memory[4096:] = 0
    assert sum_of(memory, 4096) == right


@pytest.mark.parametrize("buffer_size", [MIB, 4 * MIB, 1024 * MIB])
def test_it_holds_on_to_16_mib_or_less(buffer_size: int) -> None:
    sums = SlotChecksums(torch.device("cpu"), TAG, buffer_size)
    held = [value for value in vars(sums).values() if isinstance(value, torch.Tensor)]
    assert sums.nbytes == sum(tensor.nbytes for tensor in held)
    few_bytes_for_each_group = 16 * (buffer_size // MIB)
    assert 2 * MIB <= sums.nbytes <= min(16 * MIB, 4 * buffer_size) + few_bytes_for_each_group
