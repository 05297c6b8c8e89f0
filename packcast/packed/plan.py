"""Which bytes ride in which chunk: pure functions over frozen dataclasses.

Made before any byte moves, from nothing but sizes: every rank makes the same from one offer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from packcast.errors import UsageError
from packcast.units import MIB, format_exact_size, format_size

BLOCK = MIB  # the unit of digests, at multiples of itself in a file
PAGE = 4096
DIGEST_NBYTES = 16  # xxh3_128
TRAILER_HEAD_NBYTES = 80
MAX_PIECE = 8 * MIB  # so large that Python's cost per piece vanishes, so small that pieces overlap
MAX_BUFFER_SIZE = 16 << 30
# Beside the whole blocks that fill a buffer a chunk may carry this many short ones (ends of files);
# 63 keep the trailer within one page for every buffer up to 188 MiB.
_SPARE_BLOCKS = 63


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of one outgoing file, from a multiple of BLOCK to one or to the end."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one collective carries: extents, laid one after the other from the slot's first byte."""

    index: int
    root: int
    extents: tuple[Extent, ...]
    nbytes: int
    trailer_nbytes: int

    @property
    def trailer_offset(self) -> int:
        """Where the trailer begins: the payload's end, rounded up to a page."""
        return align_up(self.nbytes, PAGE)

    @property
    def wire_nbytes(self) -> int:
        """What the collective carries: payload, padding, trailer."""
        return self.trailer_offset + self.trailer_nbytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole blocks of one chunk, together at most one staging buffer: the unit of host I/O.

    Its extents lie one after the other in the slot. Its blocks' digests begin at `first_block`
    in the trailer.
    """

    slot_offset: int
    nbytes: int
    first_block: int
    extents: tuple[Extent, ...]


def align_up(nbytes: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `nbytes`."""
    return -(-nbytes // unit) * unit


def check_buffers(buffer_size: int, num_buffers: int) -> None:
    """Raise UsageError unless the ring could be built: sizes in bytes."""
    if buffer_size % BLOCK or not BLOCK <= buffer_size <= MAX_BUFFER_SIZE:
        raise UsageError(
            f"buffer size {format_exact_size(buffer_size)} is not a multiple of 1MiB up to 16GiB",
            hint="try --buffer-size 16MiB",
        )
    if not 1 <= num_buffers <= 1024:
        raise UsageError(f"{num_buffers} buffers: the count must be from 1 to 1024")


def check_staging(buffer_size: int, staging_nbytes: int) -> None:
    """Raise UsageError unless a rank that reads and writes could stage within that bound."""
    least = 2 * _staged_nbytes(buffer_size)
    if staging_nbytes < least:
        raise UsageError(
            f"staging of {format_exact_size(staging_nbytes)} is less than the"
            f" {format_size(least)} that buffers of {format_exact_size(buffer_size)} need",
            hint="try --staging 64MiB",
        )


def max_blocks(buffer_size: int) -> int:
    """How many blocks, whole and short, one chunk may carry."""
    return buffer_size // BLOCK + _SPARE_BLOCKS


def trailer_nbytes(buffer_size: int) -> int:
    """Room for a trailer behind the payload: one page up to 188 MiB of buffer, then more pages."""
    return align_up(TRAILER_HEAD_NBYTES + DIGEST_NBYTES * max_blocks(buffer_size), PAGE)


def slot_nbytes(buffer_size: int) -> int:
    """A slot's size: a full buffer and its trailer."""
    return buffer_size + trailer_nbytes(buffer_size)


def ring_nbytes(buffer_size: int, num_buffers: int) -> int:
    """Device memory of the ring: `num_buffers x (buffer_size + a page)`, in bytes."""
    return num_buffers * slot_nbytes(buffer_size)


def piece_nbytes(buffer_size: int) -> int:
    """The size of a staging buffer: a power of two, since pinned allocations are rounded to one."""
    largest = min(buffer_size, MAX_PIECE)
    return max(BLOCK, 1 << (largest.bit_length() - 1))


def staging_count(buffer_size: int, staging_nbytes: int) -> int:
    """How many staging buffers, each with a trailer of its own, `staging_nbytes` pay for."""
    return max(1, staging_nbytes // _staged_nbytes(buffer_size))


def pinned_nbytes(buffer_size: int, staging_nbytes: int) -> int:
    """Pinned memory of a rank with a GPU that reads or writes: at most `staging_nbytes`."""
    return staging_count(buffer_size, staging_nbytes) * _staged_nbytes(buffer_size)


def _staged_nbytes(buffer_size: int) -> int:
    trailer = trailer_nbytes(buffer_size)
    return piece_nbytes(buffer_size) + (1 << (trailer - 1).bit_length())


def plan_chunks(
    file_nbytes: Sequence[int], buffer_size: int, roots: Sequence[int]
) -> tuple[Chunk, ...]:
    """Cut files, given by their sizes, into chunks of at most `buffer_size` bytes.

    Files go in order, one after the other; a chunk takes the end of one and the beginning of the
    next where whole blocks fit. Chunk i has root `roots[i % len(roots)]`. Empty files have no
    extent: they are made from the offer alone.
    """
    chunks: list[Chunk] = []
    extents: list[Extent] = []
    used = blocks = 0
    block_limit, trailer = max_blocks(buffer_size), trailer_nbytes(buffer_size)

    def close() -> None:
        nonlocal used, blocks
        index = len(chunks)
        chunks.append(Chunk(index, roots[index % len(roots)], tuple(extents), used, trailer))
        extents.clear()
        used = blocks = 0

    for file, size in enumerate(file_nbytes):
        offset = 0
        while offset < size:
            room = min(buffer_size - used, (block_limit - blocks) * BLOCK)
            take = min(size - offset, room)
            if take < size - offset:
                take -= take % BLOCK
            if take <= 0:
                close()
                continue
            extents.append(Extent(file, offset, take))
            used += take
            blocks += num_blocks(take)
            offset += take
            if used == buffer_size:
                close()
    if extents:
        close()
    return tuple(chunks)


def plan_digest(file_nbytes: Sequence[int], buffer_size: int, chunks: Sequence[Chunk]) -> str:
    """A digest over every number in the plan; equal on two ranks iff their plans are the same."""
    digest = xxhash.xxh3_128()
    digest.update(struct.pack(f"<QQ{len(file_nbytes)}Q", buffer_size, len(chunks), *file_nbytes))
    for chunk in chunks:
        numbers = [chunk.index, chunk.root, chunk.nbytes, len(chunk.extents)]
        for extent in chunk.extents:
            numbers += (extent.file, extent.offset, extent.nbytes)
        digest.update(struct.pack(f"<{len(numbers)}Q", *numbers))
    return digest.hexdigest()


def num_blocks(nbytes: int) -> int:
    """How many blocks an extent of so many bytes has, a short last one included."""
    return -(-nbytes // BLOCK)


def pieces_of(chunk: Chunk, piece_nbytes: int) -> Iterator[Piece]:
    """The chunk in pieces of at most `piece_nbytes` (at least BLOCK), each of whole blocks."""
    extents: list[Extent] = []
    begin = used = first = seen = 0
    for extent in chunk.extents:
        offset, end = extent.offset, extent.offset + extent.nbytes
        while offset < end:
            room = piece_nbytes - used
            nbytes = end - offset if end - offset <= room else room - room % BLOCK
            if not nbytes:
                yield Piece(begin, used, first, tuple(extents))
                extents, begin, used, first = [], begin + used, 0, seen
                continue
            extents.append(Extent(extent.file, offset, nbytes))
            offset += nbytes
            used += nbytes
            seen += num_blocks(nbytes)
    if extents:
        yield Piece(begin, used, first, tuple(extents))
