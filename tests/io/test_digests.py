"""A file's digest is the digest of its blocks' digests, however the blocks came."""

from __future__ import annotations

import random
from collections.abc import Sequence

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from packcast.io.digests import BlockDigests
from packcast.packed.plan import BLOCK, Chunk, Extent, plan_chunks
from tests.helpers.blocks import blocks_of

SIZES = st.lists(st.integers(0, 9).map(lambda n: n * BLOCK // 2 + n % 2), max_size=6)


def digest_of(block: Extent) -> bytes:
    return xxhash.xxh3_128_digest(f"{block.file} {block.offset} {block.nbytes}".encode())


def digests_of(chunk: Chunk) -> bytes:
    return b"".join(map(digest_of, blocks_of(chunk.extents)))


def recorded(sizes: Sequence[int], buffer_size: int, seed: int) -> list[str]:
    chunks = list(plan_chunks(sizes, buffer_size, [0]))
    random.Random(seed).shuffle(chunks)
    digests = BlockDigests(sizes)
    # Some alone, and the rest at once.
    for group in (chunks[:1], chunks[1:2], chunks[2:]):
        digests.record(group, b"".join(map(digests_of, group)))
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
