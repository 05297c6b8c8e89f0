"""Tables of pieces against a simple model; the kernel by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packcast.packed.gather import (
    PIECE_NBYTES,
    is_right,
    move_on,
    pieces_each,
    pieces_of,
    table_of,
    tables_of,
)
from packcast.packed.tensor_map import Rows, ends_of
from tests.packed.tables import POISON, move_by_rows, random_table

has_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")

Parts = list[tuple[int, int, int]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1 << 40, 1 << 47),
            st.integers(0, 1 << 30),
            st.integers(1, 300) | st.integers(1, 5 * PIECE_NBYTES),
        ),
        max_size=20,
    ),
    st.sampled_from((PIECE_NBYTES, 4 * PIECE_NBYTES)),
)
@example([(1 << 47, 0, PIECE_NBYTES)], PIECE_NBYTES)
@example([(1 << 47, 0, PIECE_NBYTES + 1), (5, 6, 2 * PIECE_NBYTES)], PIECE_NBYTES)
def test_a_table_has_each_part_once_in_pieces_that_are_as_large_as_may_be(
    parts: Parts, piece_nbytes: int
) -> None:
    expected, counts = [], []
    for address, offset, nbytes in parts:
        begins = range(0, nbytes, piece_nbytes)
        counts.append(len(begins))
        for begin in begins:
            expected.append((address + begin, offset + begin, min(piece_nbytes, nbytes - begin)))
    address, offset, nbytes = torch.tensor(parts, dtype=torch.int64).view(-1, 3).unbind(1)
    table, rows = pieces_of(address, offset, nbytes, piece_nbytes)
    assert table.dtype == torch.int64
    assert table.is_contiguous()
    assert [tuple(row) for row in table.tolist()] == expected
    assert rows.tolist() == counts


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.tuples(
                    st.integers(0, 3),
                    st.integers(0, 1000),
                    st.integers(0, 1000),
                    st.integers(0, 300) | st.integers(0, 3 * PIECE_NBYTES),
                ),
                max_size=5,
            ),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_each_wanted_chunk_has_the_table_of_its_rows(
    chunks: list[tuple[list[tuple[int, int, int, int]], bool]],
) -> None:
    numbers = torch.tensor([row for rows, _ in chunks for row in rows], dtype=torch.int64)
    tensor, offset, slot_offset, nbytes = numbers.view(-1, 4).t().contiguous().unbind()
    counts = torch.tensor([len(rows) for rows, _ in chunks], dtype=torch.int64)
    rows = Rows(tensor, offset, slot_offset, nbytes, ends_of(counts))
    addresses = torch.tensor([1 << 40, 1 << 41, 1 << 42, 1 << 43])
    expected = []
    for each, _ in chunks:
        table = []
        for index, start, place, length in each:
            for begin in range(0, length, PIECE_NBYTES):
                address = int(addresses[index]) + start + begin
                table.append([address, place + begin, min(PIECE_NBYTES, length - begin)])
        expected.append(table)
    cpu = torch.device("cpu")
    assert [table.tolist() for table in tables_of(rows, addresses, cpu)] == expected
    wanted = [is_wanted for _, is_wanted in chunks]
    some = tables_of(rows, addresses, cpu, wanted)
    assert [table.tolist() for table in some] == [
        table if is_wanted else [] for table, is_wanted in zip(expected, wanted, strict=True)
    ]
    late = [table_of(rows, addresses, chunk).tolist() for chunk in range(len(chunks))]
    assert late == expected
    assert pieces_each(rows).tolist() == list(map(len, expected))


def test_there_is_no_kernel_without_a_gpu() -> None:
    assert move_on(torch.device("cpu")) is None


def test_a_kernel_that_is_wrong_about_one_byte_is_found_out() -> None:
    def forgetful(
        table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, alone: bool = False
    ) -> None:
        table = table.clone()
        table[200, 2] -= 1
        move_by_rows(table, slot, into_slot=into_slot)

    device = torch.device("cpu")
    assert is_right(move_by_rows, device)
    assert not is_right(forgetful, device)


def interpreter_can_loop() -> bool:
    """It takes arrays of one element for numbers, which NumPy has ended."""
    if not importlib.util.find_spec("triton"):
        return False
    import numpy

    return tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)


@pytest.mark.skipif(not interpreter_can_loop(), reason="no Triton, or NumPy is too young for it")
@pytest.mark.parametrize("seed", [1, 2])
def test_the_kernel_does_what_the_rows_say_by_tritons_interpreter(seed: int) -> None:
    command = [sys.executable, "-m", "tests.packed.tables", str(seed)]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True, timeout=100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@has_triton
@pytest.mark.parametrize("seed", range(20))
def test_the_kernel_does_what_the_rows_say_on_a_gpu(seed: int) -> None:
    dice, device = random.Random(seed), torch.device("cuda", torch.cuda.current_device())
    move = move_on(device)
    assert move is not None, "the kernel cannot be compiled here"
    sent = torch.randint(0, 256, (1 << 17,), dtype=torch.uint8)
    slot = torch.full((1 << 17,), POISON, dtype=torch.uint8)
    by_rows = slot.clone()
    table = random_table(dice, sent, slot)
    on_gpu = {}
    for name, memory in (("sent", sent), ("slot", slot), ("landed", torch.full_like(sent, POISON))):
        # As far from a multiple of 16 bytes as the host's.
        on_gpu[name] = torch.empty(len(memory) + 16, dtype=torch.uint8, device=device)
        shift = memory.data_ptr() % 16
        on_gpu[name] = on_gpu[name][shift : shift + len(memory)].copy_(memory)
    move_by_rows(table, by_rows, into_slot=True)
    starts = table[:, 0] - sent.data_ptr()
    for name, into_slot in (("sent", True), ("landed", False)):
        table[:, 0] = starts + on_gpu[name].data_ptr()
        move(table.to(device), on_gpu["slot"], into_slot=into_slot)
    assert torch.equal(on_gpu["slot"].cpu(), by_rows)
    landed = torch.full_like(sent, POISON)
    for at, nbytes in zip(starts.tolist(), table[:, 2].tolist(), strict=True):
        landed[at : at + nbytes] = sent[at : at + nbytes]
    assert torch.equal(on_gpu["landed"].cpu(), landed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@has_triton
def test_the_kernel_copies_many_large_tensors_whole() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    move = move_on(device)
    assert move is not None, "the kernel cannot be compiled here"
    tensors = [
        torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, device=device) for _ in range(40)
    ]
    slot = torch.full((40 * (3 << 20),), POISON, dtype=torch.uint8, device=device)
    offsets = torch.arange(40) * (3 << 20)
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors])
    table, _ = pieces_of(addresses, offsets, torch.full((40,), 3 << 20))
    table = table.to(device)
    move(table, slot, into_slot=True)
    assert torch.equal(slot, torch.cat(tensors))
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(POISON)
    move(table, slot, into_slot=False)
    assert all(map(torch.equal, tensors, before))
