"""A file's digest is the digest of its blocks' digests, however the blocks came."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from packcast.io.digests import BlockDigests
from packcast.packed.plan import BLOCK, Extent, plan_chunks
from tests.helpers.blocks import blocks_of
from tests.helpers.waiting import Waiter

SIZES = st.lists(st.integers(0, 9).map(lambda n: n * BLOCK // 2 + n % 2), max_size=6)


def digest_of(block: Extent) -> bytes:
    return xxhash.xxh3_128_digest(f"{block.file} {block.offset} {block.nbytes}".encode())


def recorded(sizes: Sequence[int], buffer_size: int, seed: int) -> list[str]:
    chunks = plan_chunks(sizes, buffer_size, [0])
    blocks = [block for chunk in chunks for block in blocks_of(chunk.extents)]
    random.Random(seed).shuffle(blocks)
    digests = BlockDigests(sizes)
    for block in blocks:
        digests.record(block, digest_of(block))
    return digests.of_files()


@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_neither_order_nor_buffers_change_a_files_digest(
    sizes: list[int], one: int, other: int, seed: int
) -> None:
    assert recorded(sizes, one * BLOCK, 0) == recorded(sizes, other * BLOCK, seed)


def test_it_is_the_digest_of_the_blocks_digests_in_file_order() -> None:
    sizes = [2 * BLOCK + 5, 0, BLOCK]
    first = b"".join(
        digest_of(Extent(0, offset, nbytes))
        for offset, nbytes in ((0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 5))
    )
    last = digest_of(Extent(2, 0, BLOCK))
    expected = [xxhash.xxh3_128_hexdigest(table) for table in (first, b"", last)]
    assert recorded(sizes, 2 * BLOCK, 1) == expected


@pytest.mark.parametrize("at", [0, BLOCK, 2 * BLOCK])
def test_another_block_anywhere_is_another_digest(at: int) -> None:
    sizes = [2 * BLOCK + 5]
    digests = BlockDigests(sizes)
    for chunk in plan_chunks(sizes, BLOCK, [0]):
        for block in blocks_of(chunk.extents):
            digest = digest_of(block)
            digests.record(block, digest[::-1] if block.offset == at else digest)
    assert digests.of_files() != recorded(sizes, BLOCK, 0)


def test_blocks_are_recorded_from_many_threads() -> None:
    sizes = [400 * BLOCK, 399 * BLOCK + 1]
    chunks = plan_chunks(sizes, 16 * BLOCK, [0])
    digests = BlockDigests(sizes)

    def record(first: int) -> None:
        for chunk in chunks[first::4]:
            for block in blocks_of(chunk.extents):
                digests.record(block, digest_of(block))

    for waiter in [Waiter(partial(record, first)) for first in range(4)]:
        waiter.result()
    assert digests.of_files() == recorded(sizes, BLOCK, 0)
