"""Digests of files out of digests of blocks: the same on reader and worker, whatever the buffers.

A file's digest is the xxh3_128 of its blocks' xxh3_128 digests, so it needs no second pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from packcast.packed.plan import BLOCK, DIGEST_NBYTES, Extent


class BlockDigests:
    """The digests of every block of every file, recorded as they come."""

    def __init__(self, file_nbytes: Sequence[int]) -> None:
        self._tables = [bytearray(DIGEST_NBYTES * -(-nbytes // BLOCK)) for nbytes in file_nbytes]

    def record(self, extent: Extent, digests: bytes) -> None:
        """Remember an extent's block digests; from many threads, each block once."""
        at = extent.offset // BLOCK * DIGEST_NBYTES
        self._tables[extent.file][at : at + len(digests)] = digests

    def of_blocks(self) -> list[bytes]:
        """For each file its blocks' digests, one after the other; zeros where none is recorded."""
        return [bytes(table) for table in self._tables]

    def of_files(self) -> list[str]:
        """The digest of each file, in hex; right once every block is recorded."""
        return [xxhash.xxh3_128_hexdigest(bytes(table)) for table in self._tables]
