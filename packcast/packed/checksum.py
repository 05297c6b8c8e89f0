"""A sum over a slot's payload that verifies it where its bytes stay on the GPU.

32-bit words times 64-bit multipliers by place, derived from the transfer's tag: a plain sum would
miss words that moved, an exclusive or those that moved twice. It finds accidents and is no
signature. One kernel where possible, else plain torch operations with the same result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from packcast.packed.selftested import self_tested
from packcast.units import MIB

_GROUP_NBYTES = 4 * MIB  # bounds the products and the multipliers: twice as much each
_WORD_NBYTES = 4
_MAX_SPANS_EACH = 64  # of a group, for the kernel

# kernels.add_up(words, of_words, of_groups, totals)
AddUp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], int]


class SlotChecksums:
    """Sums of one rank's slots, all on one stream, since they share temporary memory.

    Device memory: 8 to 10 MiB with the kernel, 16 MiB without, less for buffers below 4 MiB.
    """

    def __init__(self, device: torch.device, tag: bytes, buffer_size: int) -> None:
        self._add_up = kernel_on(device)
        self._words_each = min(_GROUP_NBYTES, buffer_size) // _WORD_NBYTES
        num_groups = -(-buffer_size // (self._words_each * _WORD_NBYTES))
        multipliers = _multipliers(tag, self._words_each + num_groups, device)
        self._of_words = multipliers[: self._words_each]
        self._of_groups = multipliers[self._words_each :]
        num_products = self._words_each if self._add_up is None else 0
        num_sums = num_groups * (1 if self._add_up is None else _MAX_SPANS_EACH)
        self._products = torch.empty(num_products, dtype=torch.int64, device=device)
        self._sums = torch.empty(num_sums, dtype=torch.int64, device=device)
        self.nbytes = multipliers.nbytes + self._products.nbytes + self._sums.nbytes

    def of(self, memory: torch.Tensor, nbytes: int) -> torch.Tensor:
        """The sum of the first `nbytes` of a slot, a 0-dim int64, on the current stream.

        If the last word is not whole, it includes the bytes behind it, which travel too.
        """
        num_words = -(-nbytes // _WORD_NBYTES)
        words = memory[: num_words * _WORD_NBYTES].view(torch.int32)
        if self._add_up is not None:
            count = self._add_up(words, self._of_words, self._of_groups, self._sums)
            return self._sums[:count].sum()
        groups = words.split(self._words_each)
        for group, total in zip(groups, self._sums, strict=False):
            count = group.numel()
            products = self._products[:count]
            torch.mul(group, self._of_words[:count], out=products)
            torch.sum(products, dim=0, out=total)  # wraps, as it should
        return (self._sums[: len(groups)] * self._of_groups[: len(groups)]).sum()


@functools.cache
def kernel_on(device: torch.device) -> AddUp | None:
    """The kernel, if it works there; the first call waits for the device."""

    def load() -> AddUp:
        from packcast.packed import kernels

        assert _GROUP_NBYTES // _WORD_NBYTES <= _MAX_SPANS_EACH * kernels.SPAN
        return kernels.add_up

    return self_tested(device, load, is_right)


def is_right(add_up: AddUp, device: torch.device) -> bool:
    """Whether it agrees with plain operations: three groups, the last one short and odd."""
    words_each, num_words = 1 << 18, (5 << 17) + 12_345
    # Not random: that would advance the generator that the caller has seeded.
    words = (torch.arange(num_words, device=device) * 0x9E3779B1).to(torch.int32)
    multipliers = _multipliers(bytes(range(16)), words_each + 3, device)
    of_words, of_groups = multipliers[:words_each], multipliers[words_each:]
    totals = torch.zeros(_MAX_SPANS_EACH, dtype=torch.int64, device=device)
    total = totals[: add_up(words, of_words, of_groups, totals)].sum()
    groups = words.split(words_each)
    expected = sum(
        (group * of_words[: len(group)]).sum() * factor
        for group, factor in zip(groups, of_groups, strict=True)
    )
    return bool(total == expected)


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
