"""The plan: every byte once, within the bounds, the same everywhere."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcast.errors import UsageError
from packcast.packed.plan import (
    BLOCK,
    DIGEST_NBYTES,
    MAX_FILES_PER_CHUNK,
    MAX_PIECE,
    MIN_TURNS,
    NUM_INTERLEAVED,
    PAGE,
    TRAILER_HEAD_NBYTES,
    TURN,
    align_up,
    check_buffers,
    check_staging,
    max_blocks,
    num_blocks,
    pieces_of,
    pinned_nbytes,
    plan_chunks,
    plan_digest,
    ring_nbytes,
    staged_nbytes,
    trailer_nbytes,
    unit_nbytes,
    units_of,
)
from packcast.transfer.offer import MAX_TURNS
from packcast.units import parse_size
from tests.helpers.blocks import blocks_of

MIB = 1 << 20
sizes = st.lists(
    st.one_of(
        st.integers(0, 3 * MIB),
        st.integers(0, 40).map(lambda n: n * MIB),
        st.integers(0, 40).map(lambda n: n * MIB + 1),
        st.integers(0, 300),
    ),
    max_size=40,
) | st.just([7] * 500)  # more tiny files than a trailer has room for
buffers = st.integers(1, 16).map(lambda n: n * MIB)


@given(sizes, buffers, st.integers(1, 3))
def test_every_byte_of_every_file_rides_exactly_once_in_order(
    files: list[int], buffer_size: int, num_readers: int
) -> None:
    chunks = plan_chunks(files, buffer_size, range(num_readers))
    at = [0] * len(files)
    for chunk in chunks:
        for extent in chunk.extents:
            assert extent.offset == at[extent.file]
            assert extent.nbytes > 0
            at[extent.file] += extent.nbytes
    assert at == files


@given(sizes, buffers)
def test_chunks_stay_within_the_buffer_and_name_their_roots(
    files: list[int], buffer_size: int
) -> None:
    roots = [4, 2, 7]
    for i, chunk in enumerate(plan_chunks(files, buffer_size, roots)):
        assert chunk.index == i
        assert chunk.root == roots[i % 3]
        assert 0 < chunk.nbytes <= buffer_size
        assert chunk.nbytes == sum(extent.nbytes for extent in chunk.extents)
        for block in blocks_of(chunk.extents):
            assert block.offset % BLOCK == 0
            assert block.nbytes == min(BLOCK, files[block.file] - block.offset)
        blocks = sum(1 for _ in blocks_of(chunk.extents))
        assert blocks == sum(num_blocks(extent.nbytes) for extent in chunk.extents)
        assert blocks <= max_blocks(buffer_size)
        assert TRAILER_HEAD_NBYTES + blocks * DIGEST_NBYTES <= trailer_nbytes(buffer_size)
        assert align_up(chunk.nbytes, PAGE) <= buffer_size


@given(sizes, buffers, st.sampled_from([1, 2, 8, 16]))
def test_units_are_the_chunk_cut_between_blocks_and_the_last_has_the_trailer(
    files: list[int], buffer_size: int, unit_mib: int
) -> None:
    for chunk in plan_chunks(files, buffer_size, [0]):
        units = list(units_of(chunk, unit_mib * MIB))
        blocks = list(blocks_of(chunk.extents))
        assert [b for unit in units for b in blocks_of(unit.extents)] == blocks
        at = 0
        for unit in units:
            payload = sum(extent.nbytes for extent in unit.extents)
            assert unit.slot_offset == at
            assert 0 < payload <= unit_mib * MIB
            assert unit.is_last is (unit is units[-1])
            at += payload
        assert at == chunk.nbytes
        for unit in units[:-1]:
            assert unit.nbytes == sum(extent.nbytes for extent in unit.extents)
        assert units[-1].slot_offset + units[-1].nbytes == chunk.wire_nbytes


@given(sizes, st.integers(1, 70).map(lambda n: n * MIB))
def test_every_unit_fits_into_a_staging_buffer(files: list[int], buffer_size: int) -> None:
    for chunk in plan_chunks(files, buffer_size, [0]):
        for unit in units_of(chunk, unit_nbytes(buffer_size)):
            assert unit.nbytes <= staged_nbytes(buffer_size)
    assert staged_nbytes(buffer_size) % PAGE == 0


@given(sizes, buffers)
def test_pieces_are_the_unit_cut_between_blocks(files: list[int], buffer_size: int) -> None:
    for chunk in plan_chunks(files, buffer_size, [0]):
        for unit in units_of(chunk, unit_nbytes(buffer_size)):
            pieces = list(pieces_of(unit))
            extents = [piece.extent for piece in pieces]
            assert list(blocks_of(extents)) == list(blocks_of(unit.extents))
            at = 0
            for piece in pieces:
                assert piece.at == at
                assert 0 < piece.extent.nbytes <= MAX_PIECE
                at += piece.extent.nbytes


@pytest.mark.parametrize(
    ("files", "buffer_size", "chunks"),
    [
        ([], MIB, []),
        ([0, 0], MIB, []),
        ([100, 0, 200, 300], MIB, [[100, 200, 300]]),  # small files share a chunk
        ([10 * MIB + 5], 4 * MIB, [[4 * MIB], [4 * MIB], [2 * MIB + 5]]),
        # A file that takes turns alone is not cut where they end.
        ([9 * TURN], 2 * TURN, [[2 * TURN]] * 4 + [[TURN]]),
    ],
)
def test_chunks_are_as_large_as_may_be(
    files: list[int], buffer_size: int, chunks: list[list[int]]
) -> None:
    plan = plan_chunks(files, buffer_size, [0])
    assert [[extent.nbytes for extent in chunk.extents] for chunk in plan] == chunks


def test_large_files_take_turns_and_one_that_is_through_makes_room() -> None:
    num_turns = [9, 1, 7, 4, *[6] * (NUM_INTERLEAVED - 2), 3]
    sizes = [turns * TURN for turns in num_turns]
    chunks = plan_chunks(sizes, TURN, [0])
    order = [extent.file for chunk in chunks for extent in chunk.extents]
    last = len(sizes) - 1
    assert order[:2] == [1, last]  # what is small comes first
    turns = order[order.index(0) :]
    first_turns = [0, *range(2, NUM_INTERLEAVED + 1)]
    assert turns[:NUM_INTERLEAVED] == first_turns
    late = NUM_INTERLEAVED + 1  # one more than take turns at a time
    begins = turns.index(late)
    assert turns[:begins].count(3) == MIN_TURNS == num_turns[3]  # once a file is through
    assert len({*turns[begins : begins + NUM_INTERLEAVED]}) == NUM_INTERLEAVED


@pytest.mark.parametrize(
    ("buffer_size", "num_files"), [(TURN // 2, 1), (3 * TURN // 4, 2), (2 * TURN, 2), (9 * TURN, 3)]
)
def test_a_chunk_carries_the_turns_of_several_files(buffer_size: int, num_files: int) -> None:
    chunks = plan_chunks([4 * TURN, 5 * TURN, 6 * TURN], buffer_size, [0])
    assert all(chunk.nbytes == buffer_size for chunk in chunks[:-1])
    assert max(len({extent.file for extent in chunk.extents}) for chunk in chunks) == num_files


@given(sizes, buffers)
def test_a_plan_is_a_sequence_of_chunks(files: list[int], buffer_size: int) -> None:
    plan = plan_chunks(files, buffer_size, [3, 1])
    chunks = list(plan)
    assert len(plan) == len(chunks)
    assert [plan[i - len(plan)] for i in range(len(plan))] == chunks
    assert plan[1::2] == chunks[1::2]
    for at in (len(plan), -len(plan) - 1):
        with pytest.raises(IndexError):
            plan[at]


def test_a_plan_of_a_million_extents_takes_less_than_100_megabytes() -> None:
    part = 32  # of the largest that an offer may have
    tracemalloc.start()
    try:
        plan = plan_chunks([(MAX_TURNS * TURN - BLOCK) // 1000 // part] * 1000, 16 * MIB, [0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert MAX_TURNS // part <= len(plan.numbers) // 3 < 1.5 * MAX_TURNS // part
    assert peak < 100_000_000 / part


def test_the_digest_tells_plans_apart() -> None:
    files = [5 * MIB, 3]
    plans = [
        plan_digest(f, b, plan_chunks(f, b, roots))
        for f, b, roots in [
            (files, MIB, [0]),
            (files, 2 * MIB, [0]),
            (files, MIB, [0, 1]),
            ([5 * MIB, 4], MIB, [0]),
            ([3, 5 * MIB], MIB, [0]),
            ([5 * MIB, 3, 0], MIB, [0]),
        ]
    ]
    assert len(set(plans)) == len(plans)
    assert plan_digest(files, MIB, plan_chunks(files, MIB, [0])) == plans[0]


def test_the_ring_is_count_times_buffer_and_a_page() -> None:
    assert ring_nbytes(64 * MIB, 4) == 4 * (64 * MIB + PAGE)
    assert trailer_nbytes(188 * MIB) == PAGE < trailer_nbytes(189 * MIB)


@given(buffers, st.integers(0, 100).map(lambda n: n * MIB // 2))
def test_pinned_memory_stays_within_the_staging_or_is_refused(
    buffer_size: int, staging: int
) -> None:
    try:
        check_staging(buffer_size, staging)
    except UsageError:
        assert staging < 2 * staged_nbytes(buffer_size)
    else:
        assert 2 * pinned_nbytes(buffer_size, staging // 2) <= staging
        assert pinned_nbytes(buffer_size, staging) <= staging


@given(buffers, st.integers(0, 100).map(lambda n: n * MIB // 2))
def test_a_refusal_of_staging_names_more_than_was_given_and_enough(
    buffer_size: int, staging: int
) -> None:
    staging = min(staging, 2 * staged_nbytes(buffer_size) - 1)
    with pytest.raises(UsageError) as refusal:
        check_staging(buffer_size, staging)
    shown = re.search(r"staging of (\w+) is less than the (\w+) that", refusal.value.message)
    assert shown is not None
    assert parse_size(shown[1]) == staging < parse_size(shown[2])
    check_staging(buffer_size, parse_size(shown[2]))
    assert refusal.value.hint == f"try --staging {shown[2]}, or smaller buffers"


@pytest.mark.parametrize(
    ("buffer_size", "num_buffers"), [(0, 1), (MIB + 1, 1), (MIB // 2, 1), (MIB, 0), (32 << 30, 1)]
)
def test_buffers_that_cannot_be_are_refused(buffer_size: int, num_buffers: int) -> None:
    with pytest.raises(UsageError):
        check_buffers(buffer_size, num_buffers)


def test_a_chunk_has_parts_of_a_bounded_number_of_files() -> None:
    sizes = [100] * 1500 + [40 * MIB] * 40
    chunks = plan_chunks(sizes, 1 << 30, (0,))
    files = [{extent.file for extent in chunk.extents} for chunk in chunks]
    assert max(map(len, files)) == MAX_FILES_PER_CHUNK
    assert set().union(*files) == set(range(1540))
    assert sum(chunk.nbytes for chunk in chunks) == sum(sizes)
    assert all(len(some) == MAX_FILES_PER_CHUNK for some in files[:46])  # and no smaller for it
