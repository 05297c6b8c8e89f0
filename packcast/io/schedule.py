"""Which pieces the I/O threads do, from or into which memory, in which order: pure data.

Made once from the plan, before any byte moves, and then only read: by the loop in Python, by the
I/O threads as flat arrays of 64-bit integers. Knows no descriptors, threads or devices.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from packcast.packed.plan import Chunk, Extent, Piece, num_blocks, pieces_of, units_of

IN_MEMORY = -1  # a span's file: its offset is an address in this process
PIECE_FIELDS = 5  # unit, offset in memory, bytes, first block, first span
SPAN_FIELDS = 4  # file, offset in the file, offset in the piece, bytes


class Span(NamedTuple):
    """Bytes of a piece, from `at` on, that are a run of a file; other bytes are in no file."""

    file: int
    offset: int
    at: int
    nbytes: int


SpansOf = Callable[[Extent], Iterable[Span]]


@dataclass(frozen=True, slots=True)
class ScheduledUnit:
    """A part of a chunk that is copied between slot and memory as one.

    `blocks` of the schedule's digests and `spans` of its spans are its own; it has the first byte
    of the files `opens` and the last one of the files `closes`.
    """

    index: int
    chunk: Chunk
    slot_offset: int
    memory_offset: int
    nbytes: int
    blocks: range
    spans: range
    is_last: bool
    opens: tuple[int, ...] = ()
    closes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The units of some chunks, in order, and their pieces and spans as flat arrays.

    Piece p has spans `pieces[5 p + 4]` up to `pieces[5 p + 9]`; the last one's are ended by an
    entry that is no piece. The digest of block b is the bytes from 16 b on of the digest table.
    """

    units: tuple[ScheduledUnit, ...]
    pieces: array[int]
    spans: array[int]
    num_blocks: int

    @property
    def num_pieces(self) -> int:
        return len(self.pieces) // PIECE_FIELDS - 1

    @property
    def num_spans(self) -> int:
        return len(self.spans) // SPAN_FIELDS

    def span(self, index: int) -> Span:
        """One span of the flat array."""
        return Span(*self.spans[SPAN_FIELDS * index : SPAN_FIELDS * (index + 1)])

    def piece(self, index: int) -> tuple[int, int, int, int, range]:
        """Unit, memory offset, bytes, first block and spans of one piece."""
        fields = self.pieces[PIECE_FIELDS * index : PIECE_FIELDS * (index + 2)]
        unit, memory, nbytes, block, first_span = fields[:PIECE_FIELDS]
        return unit, memory, nbytes, block, range(first_span, fields[-1])

    def units_by_chunk(self) -> dict[int, list[ScheduledUnit]]:
        """The units of each chunk, by its index."""
        found: dict[int, list[ScheduledUnit]] = {}
        for unit in self.units:
            found.setdefault(unit.chunk.index, []).append(unit)
        return found


def make_schedule(
    chunks: Sequence[Chunk],
    unit_nbytes: int,
    memory_offset: Callable[[Chunk, int], int],
    spans_of: SpansOf,
) -> Schedule:
    """The schedule for `chunks`, in units of at most `unit_nbytes` of payload.

    `memory_offset(chunk, index of the unit)` is where a unit lies. `spans_of(extent)` are the runs
    of files that an extent of at most 4 MiB comes from or goes to, in order, not overlapping.
    """
    pieces, spans = array("q"), array("q")
    drafts: list[tuple[Chunk, int, int, int, range, range, bool]] = []
    first_use: dict[int, int] = {}
    last_use: dict[int, int] = {}
    block = 0
    for chunk in chunks:
        for unit in units_of(chunk, unit_nbytes):
            index, first_block, first_span = len(drafts), block, len(spans) // SPAN_FIELDS
            memory = memory_offset(chunk, index)
            for piece in pieces_of(unit):
                where = (index, memory + piece.at, piece.extent.nbytes, block)
                pieces.extend((*where, len(spans) // SPAN_FIELDS))
                block += num_blocks(piece.extent.nbytes)
                for file in _add_spans(spans, piece, spans_of):
                    first_use.setdefault(file, index)
                    last_use[file] = index
            drafts.append(
                (
                    chunk,
                    unit.slot_offset,
                    memory,
                    unit.nbytes,
                    range(first_block, block),
                    range(first_span, len(spans) // SPAN_FIELDS),
                    unit.is_last,
                )
            )
    pieces.extend((0, 0, 0, 0, len(spans) // SPAN_FIELDS))
    opens, closes = _by_unit(first_use), _by_unit(last_use)
    units = tuple(
        ScheduledUnit(i, *draft, opens=tuple(opens.get(i, ())), closes=tuple(closes.get(i, ())))
        for i, draft in enumerate(drafts)
    )
    return Schedule(units, pieces, spans, block)


def _add_spans(spans: array[int], piece: Piece, spans_of: SpansOf) -> list[int]:
    """Append the piece's spans; the files that they are in."""
    files = []
    for span in spans_of(piece.extent):
        spans.extend(span)
        if span.file != IN_MEMORY:
            files.append(span.file)
    return files


def _by_unit(use: dict[int, int]) -> dict[int, list[int]]:
    units: dict[int, list[int]] = {}
    for file, unit in use.items():
        units.setdefault(unit, []).append(file)
    return units
