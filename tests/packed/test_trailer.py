"""The trailer: nothing but its own chunk's passes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest

from packcast.errors import TransferError
from packcast.packed.plan import PAGE, TRAILER_HEAD_NBYTES, Chunk, Extent
from packcast.packed.trailer import read_trailer, transfer_tag, write_trailer

TAG = transfer_tag("this transfer")
CHUNK = Chunk(7, 0, (Extent(0, 0, 3 << 20),), 3 << 20, PAGE)
DIGESTS = os.urandom(48)


def written() -> bytearray:
    page = bytearray(os.urandom(PAGE))
    write_trailer(memoryview(page), TAG, CHUNK, DIGESTS)
    return page


def test_digests_come_back_as_they_went() -> None:
    assert read_trailer(memoryview(written()), TAG, CHUNK, 3) == DIGESTS


@pytest.mark.parametrize(
    ("tag", "chunk", "num_blocks", "says"),
    [
        (transfer_tag("another"), CHUNK, 3, "not of this transfer"),
        (TAG, replace(CHUNK, index=11), 3, "out of order.*chunk 7"),
        (TAG, replace(CHUNK, nbytes=2 << 20), 3, "by its trailer"),
        (TAG, CHUNK, 2, "by its trailer"),
    ],
)
def test_another_chunks_trailer_is_refused(
    tag: bytes, chunk: Chunk, num_blocks: int, says: str
) -> None:
    with pytest.raises(TransferError, match=says):
        read_trailer(memoryview(written()), tag, chunk, num_blocks)


def test_a_slot_that_was_never_written_is_refused() -> None:
    with pytest.raises(TransferError, match="not of this transfer"):
        read_trailer(memoryview(bytearray(os.urandom(PAGE))), TAG, CHUNK, 3)


def test_any_flipped_bit_is_found_but_in_unused_bytes_and_the_device_sum() -> None:
    for byte in range(TRAILER_HEAD_NBYTES + 48):
        page = written()
        page[byte] ^= 0x10
        is_unsealed = 44 <= byte < 48 or 64 <= byte < TRAILER_HEAD_NBYTES
        with nullcontext() if is_unsealed else pytest.raises(TransferError):
            assert read_trailer(memoryview(page), TAG, CHUNK, 3) == DIGESTS
