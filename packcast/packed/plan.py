"""Which bytes ride in which chunk: pure functions over frozen dataclasses.

The plan is made from sizes alone, before any byte moves: every rank makes the same from one offer.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import xxhash

from packcast.errors import UsageError
from packcast.settings import MAX_FITTING_SIZE
from packcast.units import MIB, format_exact_size

BLOCK = MIB  # the unit of digests, at multiples of itself in a file
PAGE = 4096
DIGEST_NBYTES = 16  # xxh3_128
TRAILER_HEAD_NBYTES = 80
# A unit costs the interpreter about 0.1 ms, whatever its size, beside threads that fill memory.
# Larger ones need more staging and fill the pipeline later. Pieces of a unit run in parallel.
MAX_PIECE = 4 * MIB
MAX_UNIT = 16 * MIB
MAX_BUFFER_SIZE = 16 << 30
NUM_INTERLEAVED = 8  # files that take turns
TURN = 4 * MIB
MIN_TURNS = 4  # of a file that takes turns
MAX_FILES_PER_CHUNK = 32  # they are open at the same time
# A chunk may carry this many short blocks (ends of files) beside the whole ones that fill a buffer;
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
    """What one collective carries: extents, one after the other from the slot's first byte."""

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

    @property
    def own(self) -> None:
        """It always uses a slot (see `ring.Carried`)."""
        return None


@dataclass(frozen=True, slots=True)
class Unit:
    """Whole blocks of a chunk that are staged and copied as one; the last unit has the trailer.

    Its extents lie one after the other from `slot_offset` on; `nbytes` counts the trailer too.
    """

    slot_offset: int
    nbytes: int
    extents: tuple[Extent, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole blocks of one extent for one I/O thread. Its first byte is the unit's byte `at`."""

    at: int
    extent: Extent


def align_up(nbytes: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `nbytes`."""
    return -(-nbytes // unit) * unit


def check_buffers(buffer_size: int, num_buffers: int) -> None:
    """Raise UsageError unless a ring can have these buffers; sizes in bytes."""
    if buffer_size % BLOCK or not BLOCK <= buffer_size <= MAX_BUFFER_SIZE:
        raise UsageError(
            f"buffer size {format_exact_size(buffer_size)} is not a multiple of 1MiB up to 16GiB",
            hint="try --buffer-size 16MiB",
        )
    if not 1 <= num_buffers <= 1024:
        raise UsageError(
            f"{num_buffers} buffers: the count must be from 1 to 1024", hint="the default is 4"
        )


def check_staging(buffer_size: int, staging_nbytes: int) -> None:
    """Raise UsageError unless a rank can read and write with this much staging."""
    least = 2 * staged_nbytes(buffer_size)
    if staging_nbytes < least:
        enough = format_exact_size(align_up(least, MIB))  # rounded up, to differ from what it has
        raise UsageError(
            f"staging of {format_exact_size(staging_nbytes)} is less than the {enough} that"
            f" buffers of {format_exact_size(buffer_size)} need",
            hint=f"try --staging {enough}, or smaller buffers",
        )


def check_ring(buffer_size: int | None, num_buffers: int, staging_nbytes: int) -> None:
    """Raise UsageError unless ring and staging can be made; a size of None fits the checkpoint."""
    largest = MAX_FITTING_SIZE if buffer_size is None else buffer_size
    check_buffers(largest, num_buffers)
    check_staging(largest, staging_nbytes)


def max_blocks(buffer_size: int) -> int:
    """How many blocks, whole and short, one chunk may carry."""
    return buffer_size // BLOCK + _SPARE_BLOCKS


def trailer_nbytes(buffer_size: int) -> int:
    """Room for the trailer: one page for a buffer of up to 188 MiB, then more pages."""
    return align_up(TRAILER_HEAD_NBYTES + DIGEST_NBYTES * max_blocks(buffer_size), PAGE)


def slot_nbytes(buffer_size: int) -> int:
    """A slot's size: a full buffer and its trailer."""
    return buffer_size + trailer_nbytes(buffer_size)


def ring_nbytes(buffer_size: int, num_buffers: int) -> int:
    """Device memory of the ring: `num_buffers x (buffer_size + a page)`, in bytes."""
    return num_buffers * slot_nbytes(buffer_size)


def unit_nbytes(buffer_size: int) -> int:
    """The payload of a unit, at most a buffer."""
    return min(buffer_size, MAX_UNIT)


def staged_nbytes(buffer_size: int) -> int:
    """The size of a staging buffer: a unit and the trailer of the last one."""
    unit = unit_nbytes(buffer_size)
    # A later unit may begin anywhere in a page, and the trailer begins a page.
    padding = PAGE if buffer_size > unit else 0
    return unit + padding + trailer_nbytes(buffer_size)


def staging_count(buffer_size: int, staging_nbytes: int) -> int:
    """How many staging buffers `staging_nbytes` allow."""
    return max(1, staging_nbytes // staged_nbytes(buffer_size))


def pinned_nbytes(buffer_size: int, staging_nbytes: int) -> int:
    """Pinned memory of a rank with a GPU that reads, or writes: at most `staging_nbytes`."""
    return staging_count(buffer_size, staging_nbytes) * staged_nbytes(buffer_size)


class Chunks(Sequence[Chunk]):
    """A plan in columns of numbers: chunks are made on access.

    A million extents as objects would take 200 MB, and collecting garbage among them would take as
    long as making them.
    """

    __slots__ = ("_trailer_nbytes", "bounds", "numbers", "roots")

    def __init__(
        self, numbers: array[int], bounds: array[int], roots: Sequence[int], trailer_nbytes: int
    ) -> None:
        """`numbers`: file, offset and size of each extent; `bounds`: where each chunk begins."""
        self.numbers = numbers
        self.bounds = bounds
        self.roots = tuple(roots)
        self._trailer_nbytes = trailer_nbytes

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, at: int) -> Chunk: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Chunk]: ...
    def __getitem__(self, at: int | slice) -> Chunk | Sequence[Chunk]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        index = at % len(self)
        begin, end = self.bounds[index : index + 2]
        files, offsets, sizes = (self.numbers[begin + field : end : 3] for field in range(3))
        root = self.roots[index % len(self.roots)]
        extents = tuple(map(Extent, files, offsets, sizes))
        return Chunk(index, root, extents, sum(sizes), self._trailer_nbytes)


def plan_chunks(file_nbytes: Sequence[int], buffer_size: int, roots: Sequence[int]) -> Chunks:
    """Cut files, given by their sizes, into chunks of at most `buffer_size` bytes.

    Small files come first, one after the other. Up to NUM_INTERLEAVED larger ones take turns of
    TURN bytes, within a chunk too, since the writes to one file serialise. Chunks are cut between
    blocks and have parts of at most MAX_FILES_PER_CHUNK files. Chunk i has the root
    `roots[i % len(roots)]`. Empty files have no extent: the offer names them.
    """
    numbers, bounds = _packed(_in_turns(file_nbytes), buffer_size)
    return Chunks(numbers, bounds, roots, trailer_nbytes(buffer_size))


def _in_turns(file_nbytes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """All bytes of all files in sending order, as (file, offset, end); a finished file makes room
    for the next. No Extents, since there may be a million turns."""
    waiting: deque[tuple[int, int, int]] = deque()  # the rest of each file
    for file, size in enumerate(file_nbytes):
        if size < MIN_TURNS * TURN:
            yield file, 0, size
        else:
            waiting.append((file, 0, size))
    active: deque[tuple[int, int, int]] = deque()
    while waiting or active:
        while waiting and len(active) < NUM_INTERLEAVED:
            active.append(waiting.popleft())
        file, offset, end = active.popleft()
        stop = offset + TURN if active and offset + TURN < end else end
        yield file, offset, stop
        if stop < end:
            active.append((file, stop, end))


def _packed(
    runs: Iterable[tuple[int, int, int]], buffer_size: int
) -> tuple[array[int], array[int]]:
    """The runs in as few chunks as whole blocks allow; see `Chunks` for the two columns."""
    numbers, bounds = array("Q"), array("Q", [0])
    in_chunk: set[int] = set()
    most_blocks = max_blocks(buffer_size)
    room, blocks = buffer_size, most_blocks

    def end_chunk() -> None:
        nonlocal room, blocks
        bounds.append(len(numbers))
        in_chunk.clear()
        room, blocks = buffer_size, most_blocks

    for file, offset, end in runs:
        if file not in in_chunk and len(in_chunk) == MAX_FILES_PER_CHUNK:
            end_chunk()
        while offset < end:
            take = end - offset
            if take > room or num_blocks(take) > blocks:
                take = min(take, room, blocks * BLOCK)
                if take < end - offset:
                    take -= take % BLOCK
            if take > 0:
                if file in in_chunk and numbers[-3] == file and sum(numbers[-2:]) == offset:
                    numbers[-1] += take  # it continues the last extent
                else:
                    numbers.extend((file, offset, take))
                in_chunk.add(file)
                room, blocks, offset = room - take, blocks - num_blocks(take), offset + take
            if take <= 0 or not room:
                end_chunk()
    if in_chunk:
        end_chunk()
    return numbers, bounds


def plan_digest(file_nbytes: Sequence[int], buffer_size: int, chunks: Chunks) -> str:
    """A digest over every number in the plan; equal on two ranks iff their plans are equal."""
    digest = xxhash.xxh3_128()
    sizes = (buffer_size, len(chunks), len(chunks.roots), len(file_nbytes), *file_nbytes)
    for numbers in (sizes, chunks.roots, chunks.bounds, chunks.numbers):
        column = array("Q", numbers)
        if sys.byteorder == "big":
            column.byteswap()
        digest.update(column)
    return digest.hexdigest()


def num_blocks(nbytes: int) -> int:
    """How many blocks an extent of `nbytes` has, a short last one included."""
    return -(-nbytes // BLOCK)


def units_of(chunk: Chunk, unit_nbytes: int) -> Iterator[Unit]:
    """The chunk in units of at most `unit_nbytes` of payload (at least BLOCK)."""
    if chunk.nbytes <= unit_nbytes:
        yield Unit(0, chunk.wire_nbytes, chunk.extents, is_last=True)
        return
    extents: list[Extent] = []
    begin = used = 0
    for extent in chunk.extents:
        offset, end = extent.offset, extent.offset + extent.nbytes
        while offset < end:
            room = unit_nbytes - used
            nbytes = end - offset if end - offset <= room else room - room % BLOCK
            if not nbytes:
                yield Unit(begin, used, tuple(extents), is_last=False)
                extents, begin, used = [], begin + used, 0
                continue
            extents.append(Extent(extent.file, offset, nbytes))
            offset += nbytes
            used += nbytes
    yield Unit(begin, chunk.wire_nbytes - begin, tuple(extents), is_last=True)


def pieces_of(unit: Unit) -> Iterator[Piece]:
    """The unit in pieces of at most MAX_PIECE."""
    at = 0
    for extent in unit.extents:
        end = extent.offset + extent.nbytes
        for offset in range(extent.offset, end, MAX_PIECE):
            nbytes = min(MAX_PIECE, end - offset)
            yield Piece(at, Extent(extent.file, offset, nbytes))
            at += nbytes
