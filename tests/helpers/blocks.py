"""Chunks block by block, the slow way: an oracle for the code that takes whole runs at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from packcast.packed.plan import BLOCK, Extent


def blocks_of(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The extents cut at every multiple of BLOCK."""
    for extent in extents:
        for offset in range(extent.offset, extent.offset + extent.nbytes, BLOCK):
            nbytes = min(BLOCK, extent.offset + extent.nbytes - offset)
            yield Extent(extent.file, offset, nbytes)
