"""The map of tensors against a model that looks at every byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packcast.packed.plan import BLOCK, Extent, plan_chunks, units_of
from packcast.packed.tensor_map import (
    Carrier,
    Groups,
    TensorMap,
    map_tensors,
)

Runs = list[tuple[int, int, int]]
Row = tuple[int, int, int, int]


@dataclass(frozen=True)
class Carried:
    extents: tuple[Extent, ...]


def rows_of(found: TensorMap) -> list[list[Row]]:
    parts = [found.rows.of(chunk) for chunk in range(found.rows.num_chunks)]
    return [
        list(
            zip(
                part.tensor.tolist(),
                part.offset.tolist(),
                part.slot_offset.tolist(),
                part.nbytes.tolist(),
                strict=True,
            )
        )
        for part in parts
    ]


def model_of(runs: Runs, chunks: Sequence[Carrier]) -> list[list[Row]]:
    """Byte by byte: a row is a run of bytes of one tensor within one extent."""
    of_byte = {(file, at): t for t, (file, b, e) in enumerate(runs) for at in range(b, e)}
    empties = {
        (file, begin - 1): [t for t, run in enumerate(runs) if run == (file, begin, begin)]
        for file, begin, end in runs
        if begin == end
    }
    all_rows = []
    for chunk in chunks:
        rows: list[Row] = []
        place = 0
        for extent in chunk.extents:
            current = None
            for at in range(extent.offset, extent.offset + extent.nbytes):
                tensor = of_byte.get((extent.file, at))
                if tensor is not None:
                    if tensor != current:
                        rows.append((tensor, at - runs[tensor][1], place, 0))
                    last = rows[-1]
                    rows[-1] = (*last[:3], last[3] + 1)
                current = tensor
                place += 1
                for empty in empties.get((extent.file, at), ()):
                    rows.append((empty, 0, place, 0))
                    current = None
        all_rows.append(rows)
    return all_rows


def check(runs: Runs, file_nbytes: list[int], chunks: Sequence[Carrier]) -> TensorMap:
    found, model = map_tensors(runs, file_nbytes, chunks), model_of(runs, chunks)
    assert rows_of(found) == model
    columns = (found.rows.tensor, found.rows.offset, found.rows.slot_offset, found.rows.nbytes)
    assert {column.dtype for column in (*columns, found.first, found.last)} == {torch.int64}
    chunks_of = [
        [i for i, rows in enumerate(model) if tensor in {row[0] for row in rows}]
        for tensor in range(len(runs))
    ]
    assert found.first.tolist() == [min(each) for each in chunks_of]
    assert found.last.tolist() == [max(each) for each in chunks_of]
    done = [sum(max(each) <= chunk for each in chunks_of) for chunk in range(len(chunks))]
    assert found.num_complete().tolist() == done
    return found


@st.composite
def plans(draw: st.DrawFn) -> tuple[Runs, list[int], list[Carried]]:
    """Files with a header and tensors, or none at all; cut anywhere, their extents in any mixture.

    Some tensors are left out, as those are that nobody wants.
    """
    runs: Runs = []
    file_nbytes: list[int] = []
    for file in range(draw(st.integers(1, 4))):
        at = draw(st.integers(1, 9))
        for nbytes in draw(st.lists(st.integers(0, 12), max_size=6)):
            if draw(st.integers(0, 4)):
                runs.append((file, at, at + nbytes))
            at += nbytes
        file_nbytes.append(at)
    left = {file: 0 for file, nbytes in enumerate(file_nbytes) if nbytes}
    chunks: list[Carried] = []
    extents: list[Extent] = []
    while left:
        file = draw(st.sampled_from(sorted(left)))
        nbytes = draw(st.integers(1, file_nbytes[file] - left[file]))
        extents.append(Extent(file, left[file], nbytes))
        left[file] += nbytes
        if left[file] == file_nbytes[file]:
            del left[file]
        if not left or draw(st.booleans()):
            chunks.append(Carried(tuple(extents)))
            extents = []
    return runs, file_nbytes, chunks


@settings(max_examples=120, deadline=None)
@given(plans())
@example(([], [5], [Carried((Extent(0, 0, 5),))]))
@example(([(0, 3, 3), (0, 3, 3), (0, 3, 4), (0, 4, 4)], [4], [Carried((Extent(0, 0, 4),))]))
def test_every_byte_of_every_tensor_is_in_one_row_and_every_tensor_has_one(
    plan: tuple[Runs, list[int], list[Carried]],
) -> None:
    check(*plan)


def test_the_real_plan_of_files_that_take_turns_with_tensors_across_its_chunks() -> None:
    sizes = [20 * BLOCK + 3, 0, 17 * BLOCK, 300]
    runs = [
        (0, 9, 7 * BLOCK),
        (0, 7 * BLOCK, 7 * BLOCK),
        (0, 7 * BLOCK, 20 * BLOCK + 3),
        (2, 8, 17 * BLOCK),
        (3, 10, 299),
        (3, 299, 299),
        (3, 299, 300),
    ]
    chunks = plan_chunks(sizes, 3 * BLOCK, (0,))
    found = map_tensors(runs, sizes, chunks)
    rows = rows_of(found)
    # Files of less than 16 MiB come first, and the others in turns of 4 MiB.
    assert rows[0][:3] == [(4, 0, 10, 289), (5, 0, 299, 0), (6, 0, 299, 1)]
    assert {row[0] for row in rows[1]} | {row[0] for row in rows[2]} == {0, 3}
    for tensor, (_, begin, end) in enumerate(runs):
        reached = 0
        for _, offset, _, nbytes in (row for each in rows for row in each if row[0] == tensor):
            assert offset == reached
            reached += nbytes
        assert reached == end - begin
    assert found.num_complete().tolist()[0] == 3
    assert found.num_complete().tolist()[-1] == len(runs)


def test_units_of_a_chunk_have_maps_as_chunks_have() -> None:
    sizes = [20 * BLOCK + 3]
    (chunk,) = plan_chunks(sizes, 64 * BLOCK, (0,))
    units = list(units_of(chunk, 16 * BLOCK))
    found = map_tensors([(0, 8, 20 * BLOCK + 3)], sizes, units)
    assert rows_of(found) == [[(0, 0, 8, 16 * BLOCK - 8)], [(0, 16 * BLOCK - 8, 0, 4 * BLOCK + 3)]]


def test_groups_are_in_order_within_a_chunk_and_have_only_what_is_wanted() -> None:
    chunk_of, mask = torch.tensor([2, 0, 2, 0, 2]), torch.tensor([True, True, True, False, False])
    every, some = Groups.by(chunk_of, 4), Groups.by(chunk_of, 4, mask)
    assert [every.of(i).tolist() for i in range(4)] == [[1, 3], [], [0, 2, 4], []]
    assert [some.of(i).tolist() for i in range(4)] == [[1], [], [0, 2], []]
