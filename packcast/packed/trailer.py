"""The page behind each chunk that verifies it: transfer, index, size, block digests, device sum.

`read_trailer` refuses a stale slot, a reordered or damaged chunk, and one of another transfer.
"""

from __future__ import annotations

import struct

import xxhash

from packcast.errors import TransferError
from packcast.packed.plan import DIGEST_NBYTES, TRAILER_HEAD_NBYTES, Chunk

_MAGIC = b"packcast"
# Magic, transfer, index, nbytes, blocks, digest of the rest.
_HEAD = struct.Struct("<8s16sQQI4x16s")
# The device sum (checksum.py) is outside the digest: a GPU writes it later, if a worker needs it.
SUM_OFFSET = _HEAD.size
SUM_NBYTES = 8

assert SUM_OFFSET + SUM_NBYTES <= TRAILER_HEAD_NBYTES
assert SUM_OFFSET % SUM_NBYTES == 0


def transfer_tag(transfer_id: str) -> bytes:
    """Sixteen bytes that distinguish this transfer's chunks from any other's."""
    return xxhash.xxh3_128_digest(transfer_id.encode())


def write_trailer(into: memoryview, tag: bytes, chunk: Chunk, digests: bytes) -> None:
    """Write the trailer of `chunk`, with its block digests, to the start of `into`."""
    num_blocks = len(digests) // DIGEST_NBYTES
    head = (_MAGIC, tag, chunk.index, chunk.nbytes, num_blocks)
    seal = xxhash.xxh3_128_digest(_HEAD.pack(*head, b"") + digests)
    into[: _HEAD.size] = _HEAD.pack(*head, seal)
    into[SUM_OFFSET : SUM_OFFSET + SUM_NBYTES] = bytes(SUM_NBYTES)  # to be added to
    begin = TRAILER_HEAD_NBYTES
    into[begin : begin + len(digests)] = digests


def read_trailer(page: memoryview, tag: bytes, chunk: Chunk, num_blocks: int) -> bytes:
    """The chunk's `num_blocks` block digests; TransferError unless this is its trailer."""
    magic, its_tag, index, nbytes, its_blocks, seal = _HEAD.unpack_from(page)
    where = f"chunk {chunk.index}"
    if magic != _MAGIC or its_tag != tag:
        raise TransferError(f"{where} is not of this transfer: its trailer is missing or foreign")
    if index != chunk.index:
        raise TransferError(f"{where} came out of order: its trailer says chunk {index}")
    if nbytes != chunk.nbytes or its_blocks != num_blocks:
        raise TransferError(
            f"{where} has {chunk.nbytes} bytes by the plan, {nbytes} by its trailer"
        )
    begin = TRAILER_HEAD_NBYTES
    digests = bytes(page[begin : begin + num_blocks * DIGEST_NBYTES])
    unsealed = _HEAD.pack(magic, its_tag, index, nbytes, its_blocks, b"")
    if xxhash.xxh3_128_digest(unsealed + digests) != seal:
        raise TransferError(f"the trailer of {where} was damaged on the way")
    return digests


def has_sum(page: memoryview) -> bool:
    """Whether something is left of the device sum; zero is where no root has added it, or where
    the same was subtracted."""
    return any(page[SUM_OFFSET : SUM_OFFSET + SUM_NBYTES])
