"""Digests of files out of digests of blocks: the same on reader and worker, whatever the buffers.

A file's digest is the xxh3_128 of its blocks' xxh3_128 digests, so it needs no second pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from packcast.packed.plan import BLOCK, DIGEST_NBYTES, Chunk, num_blocks

SEND_AGAIN = "send it again; if it happens again, check the memory and the network of this host"


class BlockDigests:
    """The digests of every block of every file, recorded as chunks come."""

    def __init__(self, file_nbytes: Sequence[int]) -> None:
        self._tables = [bytearray(DIGEST_NBYTES * -(-nbytes // BLOCK)) for nbytes in file_nbytes]

    def record(self, chunks: Iterable[Chunk], digests: bytes | bytearray) -> None:
        """Remember the digests of the chunks' blocks, which are in the order of the chunks."""
        begin = 0
        view = memoryview(digests)
        for chunk in chunks:
            for extent in chunk.extents:
                at = extent.offset // BLOCK * DIGEST_NBYTES
                nbytes = num_blocks(extent.nbytes) * DIGEST_NBYTES
                self._tables[extent.file][at : at + nbytes] = view[begin : begin + nbytes]
                begin += nbytes

    def of_blocks(self) -> list[bytes]:
        """For each file its blocks' digests, one after the other; zeros where none is recorded."""
        return [bytes(table) for table in self._tables]

    def of_files(self) -> list[str]:
        """The digest of each file, in hex; right once every block is recorded."""
        return [xxhash.xxh3_128_hexdigest(bytes(table)) for table in self._tables]
