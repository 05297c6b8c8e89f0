"""The GPU kernels, in Triton: copies of a table of pieces into or out of a slot, and sums."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl

_PIECES = 4
_BLOCK = 2048  # words of 8 bytes: with 8 warps each thread has 16 copies of 16 bytes in flight
_NUM_WARPS = 8
SPAN = 16384  # words of 4 bytes that one program adds up; groups have a multiple of it
# A broadcast's blocks need almost a whole multiprocessor each and start together with a copy: a
# copy that fills the GPU would delay the broadcast. A quarter of an H100 copies tensors of 16 KiB
# faster than NVLink carries them.
_SHARE_OF_GPU = 1 / 4


def _copy_pieces(
    table: tl.tensor,
    count: tl.tensor,
    slot: tl.tensor,
    into_slot: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows of the table are (address, offset in the slot, bytes); programs take them in turn, each
    several at once: one small piece after the other would wait for each one's first byte."""
    for first in range(tl.program_id(0) * PIECES, count, tl.num_programs(0) * PIECES):
        # Nothing is prefetched across the loop: Triton 3.6 computes the maxima below from the rows
        # of the first turn if rows are carried from turn to turn.
        rows = first + tl.arange(0, PIECES)
        row, is_there = table + rows * 3, rows < count
        address = tl.load(row, mask=is_there, other=0)
        nbytes = tl.load(row + 2, mask=is_there, other=0)
        inside = slot.to(tl.int64) + tl.load(row + 1, mask=is_there, other=0)
        source, target = inside, address
        if into_slot:
            source, target = address, inside
        # Words only if both addresses are multiples of 16. Rounding them down keeps the promise to
        # the compiler, which then copies 16 bytes at once, true for every table.
        words = tl.where((source | target) % 16 == 0, nbytes // 16 * 2, 0)
        source_words = (source // 16 * 16).to(tl.pointer_type(tl.int64))[:, None]
        source_words = tl.multiple_of(source_words, (16, 16))
        target_words = (target // 16 * 16).to(tl.pointer_type(tl.int64))[:, None]
        target_words = tl.multiple_of(target_words, (16, 16))
        for begin in range(0, tl.max(words, axis=0), BLOCK):
            at = begin + tl.arange(0, BLOCK)[None, :]
            is_in = at < words[:, None]
            tl.store(target_words + at, tl.load(source_words + at, mask=is_in), mask=is_in)
        # On the compatible wire, one odd size makes the rest of a buffer unaligned.
        done, left = words * 8, nbytes - words * 8
        source_bytes = (source + done).to(tl.pointer_type(tl.uint8))[:, None]
        target_bytes = (target + done).to(tl.pointer_type(tl.uint8))[:, None]
        for begin in range(0, tl.max(left, axis=0), BLOCK):
            at = begin + tl.arange(0, BLOCK)[None, :]
            is_in = at < left[:, None]
            tl.store(target_bytes + at, tl.load(source_bytes + at, mask=is_in), mask=is_in)


def _add_up(
    words: tl.tensor,
    num_words: tl.tensor,
    of_words: tl.tensor,
    of_groups: tl.tensor,
    words_each: tl.tensor,
    total: tl.tensor,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each program adds SPAN words of one group, times their multipliers, to the total."""
    begin = tl.program_id(0).to(tl.int64) * SPAN
    group = begin // words_each
    in_group = begin - group * words_each
    sums = tl.zeros([BLOCK], dtype=tl.int64)
    for step in range(0, SPAN, BLOCK):
        at = step + tl.arange(0, BLOCK)
        word = tl.load(words + begin + at, mask=begin + at < num_words, other=0)
        sums += word.to(tl.int64) * tl.load(of_words + in_group + at)
    tl.atomic_add(total, tl.sum(sums, axis=0) * tl.load(of_groups + group), sem="relaxed")


class _Launcher:
    """Launches a kernel that was compiled once, without Triton's look-up of what to compile, which
    takes longer than the launch."""

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        self._compiled: dict[Hashable, Any] = {}
        self._knows_how = True

    def __call__(self, key: Hashable, programs: int, *arguments: object) -> None:
        """Arguments of the same `key` are the same to the compiler."""
        compiled = self._compiled.get(key)
        if compiled is not None:
            try:
                compiled[(programs, 1, 1)](*arguments)
                return
            except TypeError:  # Triton before 3.3 does not take the constants
                self._compiled.clear()
                self._knows_how = False
        compiled = self._jitted[(programs,)](*arguments, num_warps=_NUM_WARPS)
        if self._knows_how:
            self._compiled[key] = compiled


# Not specialized: each combination of sizes and alignments would be compiled again.
_copy = _Launcher(triton.jit(do_not_specialize=["table", "count", "slot"])(_copy_pieces))
_sum = _Launcher(triton.jit(do_not_specialize=["num_words", "words_each"])(_add_up))


def launch(table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, programs: int) -> None:
    """Copy the table's pieces, on the current stream of their device.

    `table` is int64 of shape (pieces, 3), contiguous: address, offset in the slot, bytes. `slot`
    is uint8.
    """
    count = table.shape[0]
    programs = min(-(-count // _PIECES), programs)
    key = (table.get_device(), into_slot)
    _copy(key, programs, table, count, slot, into_slot, _PIECES, _BLOCK)


def add_up(
    words: torch.Tensor,
    of_words: torch.Tensor,
    of_groups: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Add the sum of int32 `words` to `total`, on the current stream.

    A group has `len(of_words)` words, a multiple of SPAN. `of_words`, `of_groups` and `total`, of
    one element, are int64.
    """
    tensors, num_words = (words, of_words, of_groups, total), words.numel()
    # The compiler knows which addresses are multiples of 16, and whether a size has 32 bits.
    key = (words.get_device(), *(it.data_ptr() % 16 for it in tensors), num_words >> 31)
    programs = -(-num_words // SPAN)
    _sum(
        key, programs, words, num_words, of_words, of_groups, of_words.numel(), total, SPAN, _BLOCK
    )


def programs_on(device: torch.device) -> tuple[int, int]:
    """How many programs leave room for a broadcast, and how many fill the GPU."""
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, int(processors * _SHARE_OF_GPU)), processors
