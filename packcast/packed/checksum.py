"""A sum over a slot's payload that verifies it where its bytes stay on the GPU.

32-bit words times 64-bit multipliers by place, derived from the transfer's tag: a plain sum would
miss words that moved, an exclusive or those that moved twice. It finds accidents and is no
signature. The root adds it to a place behind the payload, a receiver subtracts its own there: zero
is left where both have the same bytes. One kernel where possible, else plain torch operations with
the same result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from packcast.packed.ring import Slot
from packcast.packed.selftested import self_tested
from packcast.packed.trailer import SUM_NBYTES
from packcast.units import MIB

_GROUP_NBYTES = 4 * MIB  # bounds the products and the multipliers: twice as much each
_WORD_NBYTES = 4

# kernels.add_up(words, of_words, of_groups, total)
AddUp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class SlotChecksums:
    """Sums of one rank's slots, all on one stream, since they share temporary memory.

    Each is added to a number in the slot, or with `subtract` taken from it. Device memory: 8 MiB
    with the kernel, 16 MiB without, less for buffers below 4 MiB.
    """

    def __init__(
        self, device: torch.device, tag: bytes, buffer_size: int, *, subtract: bool = False
    ) -> None:
        self._add_up = kernel_on(device)
        self._words_each = min(_GROUP_NBYTES, buffer_size) // _WORD_NBYTES
        num_groups = -(-buffer_size // (self._words_each * _WORD_NBYTES))
        multipliers = _multipliers(tag, self._words_each + num_groups, device)
        self._of_words = multipliers[: self._words_each]
        self._of_groups = multipliers[self._words_each :]
        if subtract:
            self._of_groups.neg_()
        num_products, num_sums = (self._words_each, num_groups) if self._add_up is None else (0, 0)
        self._products = torch.empty(num_products, dtype=torch.int64, device=device)
        self._sums = torch.empty(num_sums, dtype=torch.int64, device=device)
        self.nbytes = multipliers.nbytes + self._products.nbytes + self._sums.nbytes

    def add(self, slot: Slot, nbytes: int, at: int) -> None:
        """The sum of the slot's first `nbytes` to the int64 at byte `at`, on the current stream.

        If the last word is not whole, it includes the bytes behind it, which travel too.
        """
        num_words = -(-nbytes // _WORD_NBYTES)
        words = slot.view(0, num_words * _WORD_NBYTES, torch.int32)
        total = slot.view(at, SUM_NBYTES, torch.int64)
        if self._add_up is not None:
            self._add_up(words, self._of_words, self._of_groups, total)
            return
        groups = words.split(self._words_each)
        for group, sum_of_group in zip(groups, self._sums, strict=False):
            count = group.numel()
            products = self._products[:count]
            torch.mul(group, self._of_words[:count], out=products)
            torch.sum(products, dim=0, out=sum_of_group)  # wraps, as it should
        total += (self._sums[: len(groups)] * self._of_groups[: len(groups)]).sum()


@functools.cache
def kernel_on(device: torch.device) -> AddUp | None:
    """The kernel, if it works there; the first call waits for the device."""

    def load() -> AddUp:
        from packcast.packed import kernels

        return kernels.add_up

    return self_tested(device, load, is_right)


def is_right(add_up: AddUp, device: torch.device) -> bool:
    """Whether it agrees with plain operations: three groups, the last one short and odd."""
    words_each, num_words = 1 << 18, (5 << 17) + 12_345
    # Not random: that would advance the generator that the caller has seeded.
    words = (torch.arange(num_words, device=device) * 0x9E3779B1).to(torch.int32)
    multipliers = _multipliers(bytes(range(16)), words_each + 3, device)
    of_words, of_groups = multipliers[:words_each], multipliers[words_each:]
    total = torch.full((1,), 7, dtype=torch.int64, device=device)
    add_up(words, of_words, of_groups, total)
    groups = words.split(words_each)
    expected = sum(
        (group * of_words[: len(group)]).sum() * factor
        for group, factor in zip(groups, of_groups, strict=True)
    )
    return bool(total == expected + 7)


def _multipliers(tag: bytes, count: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers by tag and place: splitmix64 in int64, which wraps like uint64. torch's
    own generators may differ between versions."""
    seed = int.from_bytes(tag[:8], "little", signed=True)
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    z = z * _signed(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (z ^ _shifted(z, 31)) | 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: torch.Tensor, count: int) -> torch.Tensor:
    """Shifted right as an unsigned number; torch would shift the sign in."""
    return (value >> count) & ((1 << (64 - count)) - 1)
