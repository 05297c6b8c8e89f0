"""The schedule, alone: every byte once, in order, in its place, with the files that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from packcast.io.schedule import IN_MEMORY, Schedule, Span, make_schedule
from packcast.packed.plan import (
    BLOCK,
    MAX_PIECE,
    PAGE,
    Chunk,
    Extent,
    num_blocks,
    plan_chunks,
    staged_nbytes,
    unit_nbytes,
)
from tests.helpers.blocks import blocks_of

NUM_PLACES = 3

sizes = st.lists(
    st.integers(0, 40).map(lambda n: n * BLOCK // 2 + n % 3) | st.integers(0, 5000), max_size=8
)


class Case:
    """A plan for files of some sizes, its schedule, and what each byte comes from.

    Outgoing files are cut into runs of two sources and literals, in turns; each source's run lies
    where it lies in the outgoing file, so that a byte is known by its offset.
    """

    def __init__(
        self,
        file_nbytes: list[int],
        buffer_mib: int,
        roots: int = 1,
        run_nbytes: int = 1 << 40,
        root: int = 0,
    ) -> None:
        self.file_nbytes = file_nbytes
        self.run_nbytes = run_nbytes
        self.buffer_size = buffer_mib * BLOCK
        chunks = plan_chunks(file_nbytes, self.buffer_size, range(roots))
        self.chunks = [chunk for chunk in chunks if chunk.root == root]
        self.unit_nbytes = unit_nbytes(self.buffer_size)
        self.schedule = make_schedule(self.chunks, self.unit_nbytes, self.place, self.spans_of)

    def place(self, chunk: Chunk, unit: int) -> int:
        return unit % NUM_PLACES * staged_nbytes(self.buffer_size)

    def source_of(self, file: int, offset: int) -> int:
        """Which source a byte of an outgoing file is from: one of its two, or memory."""
        kind = offset // self.run_nbytes % 3
        return IN_MEMORY if kind == 2 else 2 * file + kind

    def spans_of(self, extent: Extent) -> Iterator[Span]:
        at = extent.offset
        while at < extent.offset + extent.nbytes:
            end = min((at // self.run_nbytes + 1) * self.run_nbytes, extent.offset + extent.nbytes)
            yield Span(self.source_of(extent.file, at), at, at - extent.offset, end - at)
            at = end


cases = st.builds(
    Case,
    sizes,
    st.sampled_from([1, 2, 3, 16, 17, 64]),
    st.integers(1, 3),
    st.sampled_from([1 << 40, 3 * BLOCK + 5, 700_001]),
)


def pieces_of(schedule: Schedule) -> list[tuple[int, int, int, int, range]]:
    return [schedule.piece(i) for i in range(schedule.num_pieces)]


def extents_of(case: Case) -> list[Extent]:
    """Those of the pieces, one after the other, by the plan alone."""
    blocks = [block for chunk in case.chunks for block in blocks_of(chunk.extents)]
    first_block = [first for *_, first, _ in pieces_of(case.schedule)] + [len(blocks)]
    return [
        Extent(blocks[begin].file, blocks[begin].offset, sum(b.nbytes for b in blocks[begin:end]))
        for begin, end in pairwise(first_block)
    ]


@given(cases)
def test_every_byte_of_every_chunk_is_in_one_piece_and_blocks_are_in_wire_order(case: Case) -> None:
    pieces = pieces_of(case.schedule)
    wire = [block for chunk in case.chunks for block in blocks_of(chunk.extents)]
    assert case.schedule.num_blocks == len(wire)
    for (_, _, nbytes, first, _), extent in zip(pieces, extents_of(case), strict=True):
        assert 0 < nbytes <= MAX_PIECE
        own = wire[first : first + num_blocks(nbytes)]
        assert sum(block.nbytes for block in own) == nbytes
        assert {block.file for block in own} == {extent.file}
        assert all(a.offset + a.nbytes == b.offset for a, b in pairwise(own))
    # Each block is in the one piece that begins before it: none is left out or done twice.
    assert sum(num_blocks(nbytes) for _, _, nbytes, _, _ in pieces) == len(wire)
    assert [first for *_, first, _ in pieces] == sorted({first for *_, first, _ in pieces})


@given(sizes, st.sampled_from([1, 4, 17]))
def test_all_roots_together_have_every_byte_of_every_file_once(
    file_nbytes: list[int], buffer_mib: int
) -> None:
    seen = [bytearray(-(-nbytes // 500)) for nbytes in file_nbytes]
    counted = [0] * len(file_nbytes)
    for root in range(2):
        for extent in extents_of(Case(file_nbytes, buffer_mib, roots=2, root=root)):
            counted[extent.file] += extent.nbytes
            begin, end = -(-extent.offset // 500), -(-(extent.offset + extent.nbytes) // 500)
            assert not any(seen[extent.file][begin:end])
            seen[extent.file][begin:end] = b"\1" * (end - begin)
    assert counted == file_nbytes
    assert all(all(marks) for marks in seen)


@given(cases)
def test_units_follow_each_other_in_their_chunk_and_stay_within_their_place(case: Case) -> None:
    units = case.schedule.units
    assert [unit.index for unit in units] == list(range(len(units)))
    by_chunk = case.schedule.units_by_chunk()
    assert list(by_chunk) == [chunk.index for chunk in case.chunks]
    for chunk in case.chunks:
        own = by_chunk[chunk.index]
        ends = list(accumulate(unit.nbytes for unit in own))
        assert [unit.slot_offset for unit in own] == [0, *ends[:-1]]
        assert ends[-1] == chunk.wire_nbytes
        assert [unit.is_last for unit in own] == [False] * (len(own) - 1) + [True]
    place_nbytes = staged_nbytes(case.buffer_size)
    for unit in units:
        assert unit.memory_offset == unit.index % NUM_PLACES * place_nbytes
        assert unit.nbytes <= place_nbytes
        payload = min(unit.nbytes, unit.chunk.nbytes - unit.slot_offset)
        assert payload <= case.unit_nbytes
        if unit.is_last:
            assert unit.chunk.trailer_offset - unit.slot_offset <= case.unit_nbytes + PAGE


@given(cases)
def test_a_units_pieces_fill_its_payload_and_its_blocks_and_spans_are_theirs(case: Case) -> None:
    pieces = pieces_of(case.schedule)
    for unit in case.schedule.units:
        own = [piece for piece in pieces if piece[0] == unit.index]
        begins = [memory - unit.memory_offset for _, memory, *_ in own]
        ends = list(accumulate(nbytes for _, _, nbytes, _, _ in own))
        assert begins == [0, *ends[:-1]]
        assert ends[-1] == min(unit.nbytes, unit.chunk.nbytes - unit.slot_offset)
        assert unit.blocks == range(own[0][3], own[-1][3] + num_blocks(own[-1][2]))
        assert unit.spans == range(own[0][4].start, own[-1][4].stop)
    assert [piece[0] for piece in pieces] == sorted(piece[0] for piece in pieces)


@given(cases)
@example(Case([5 * BLOCK], 2, run_nbytes=700_001))
def test_a_pieces_spans_lie_in_it_in_order_and_lead_to_its_bytes(case: Case) -> None:
    spans = 0
    for (*_, nbytes, _, own), extent in zip(
        pieces_of(case.schedule), extents_of(case), strict=True
    ):
        assert own.start == spans
        spans = own.stop
        at = 0
        for span in map(case.schedule.span, own):
            assert span.at == at
            assert span.offset == extent.offset + at
            assert span.file == case.source_of(extent.file, span.offset)
            at += span.nbytes
        assert at == nbytes
    assert spans == case.schedule.num_spans


@given(cases)
def test_a_file_is_opened_before_its_first_byte_and_closed_after_its_last(case: Case) -> None:
    schedule = case.schedule
    uses: dict[int, list[int]] = {}
    for unit in schedule.units:
        for span in map(schedule.span, unit.spans):
            if span.file != IN_MEMORY:
                uses.setdefault(span.file, []).append(unit.index)
    opens = {file: unit.index for unit in schedule.units for file in unit.opens}
    closes = {file: unit.index for unit in schedule.units for file in unit.closes}
    assert opens == {file: min(units) for file, units in uses.items()}
    assert closes == {file: max(units) for file, units in uses.items()}
    assert sum(len(unit.opens) + len(unit.closes) for unit in schedule.units) == 2 * len(uses)


def test_without_chunks_there_is_nothing_to_do() -> None:
    schedule = make_schedule([], BLOCK, lambda *_: 0, lambda _: ())
    assert (schedule.units, schedule.num_pieces, schedule.num_spans) == ((), 0, 0)
    assert schedule.num_blocks == 0
    assert schedule.units_by_chunk() == {}


def test_a_schedule_can_be_reckoned_by_hand() -> None:
    """A file of six blocks and a bit behind a small one, in buffers of eight: one chunk."""
    case = Case([6 * BLOCK + 10, 100], 8)
    expected = [
        (0, 0, MAX_PIECE, 0, range(1)),
        (0, MAX_PIECE, 2 * BLOCK + 10, 4, range(1, 2)),
        (0, 6 * BLOCK + 10, 100, 7, range(2, 3)),
    ]
    assert pieces_of(case.schedule) == expected
    assert case.schedule.num_blocks == 8
    (unit,) = case.schedule.units
    assert (unit.opens, unit.closes) == ((0, 2), (0, 2))
