"""A sum over a slot's payload that proves it where its bytes stay on the GPU.

32-bit words times 64-bit multipliers, one for each place, drawn from the transfer's tag: a sum of
plain words would miss what moved, an exclusive or what moved twice. It finds accidents, and is no
signature. Plain torch operations, so that a CPU computes the same.
"""

from __future__ import annotations

import torch

from packcast.units import MIB

_GROUP_NBYTES = 4 * MIB  # bounds the temporaries: twice as much, once; and the multipliers again
_WORD_NBYTES = 4


class SlotSums:
    """Sums of one rank's slots, all on one lane, since they share their temporaries.

    Device memory, for as long as it lives: 16 MiB, less for buffers below 4 MiB.
    """

    def __init__(self, device: torch.device, tag: bytes, buffer_size: int) -> None:
        self._words_each = min(_GROUP_NBYTES, buffer_size) // _WORD_NBYTES
        num_groups = -(-buffer_size // (self._words_each * _WORD_NBYTES))
        multipliers = _multipliers(tag, self._words_each + num_groups, device)
        self._of_words = multipliers[: self._words_each]
        self._of_groups = multipliers[self._words_each :]
        self._products = torch.empty(self._words_each, dtype=torch.int64, device=device)
        self._sums = torch.empty(num_groups, dtype=torch.int64, device=device)

    def of(self, memory: torch.Tensor, nbytes: int) -> torch.Tensor:
        """The sum of the first `nbytes` of a slot: an int64 of no dimension, on the current stream.

        A last word that is not whole takes in what lies behind it, which travels too.
        """
        num_words = -(-nbytes // _WORD_NBYTES)
        words = memory[: num_words * _WORD_NBYTES].view(torch.int32)
        groups = words.split(self._words_each)
        for group, total in zip(groups, self._sums, strict=False):
            count = group.numel()
            products = self._products[:count]
            torch.mul(group, self._of_words[:count], out=products)
            torch.sum(products, dim=0, out=total)  # wraps, as it should
        return (self._sums[: len(groups)] * self._of_groups[: len(groups)]).sum()


def _multipliers(tag: bytes, count: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers that depend on the tag and their place: splitmix64's, in plain integers,
    since generators may differ between versions of torch. int64 stands for uint64 and wraps."""
    seed = int.from_bytes(tag[:8], "little", signed=True)
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    z = z * _signed(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (z ^ _shifted(z, 31)) | 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: torch.Tensor, count: int) -> torch.Tensor:
    """To the right as an unsigned number; torch shifts the sign in."""
    return (value >> count) & ((1 << (64 - count)) - 1)
