"""The native layout for tensors: every byte once, aligned, in bounds; and plans of strangers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packcast.errors import TransferError
from packcast.packed import layout
from packcast.packed.layout import (
    ALIGNMENT,
    ReplayChunk,
    TensorSpec,
    check_plan,
    describe,
    dtype_called,
    lay_out,
    slot_nbytes_of,
    specs_of,
    understand,
)
from tests.packed.wire_model import DTYPES

LIMIT = 2048  # of what rides alone, where the tests are small

PLAN: dict[str, Any] = {
    "buffer_size": 512,
    "num_buffers": 2,
    "tensors": [["a", [2, 3], "float32", None], ["b", [2, 3], "float32", "a"]],
}


def flat(name: str, nbytes: int) -> TensorSpec:
    return TensorSpec(name, (nbytes,), torch.uint8)


@st.composite
def plans(draw: st.DrawFn) -> tuple[tuple[TensorSpec, ...], int]:
    """Specs, some of them tied, and a buffer size that many of them exceed."""
    specs: list[TensorSpec] = []
    for name in draw(st.lists(st.text(max_size=5), max_size=12, unique=True)):
        free = [spec for spec in specs if spec.same_as is None and spec.name]
        if free and draw(st.integers(0, 3)) == 0:
            other = draw(st.sampled_from(free))
            specs.append(replace(other, name=name, same_as=other.name))
        else:
            shape = draw(st.lists(st.integers(0, 40), max_size=3))
            specs.append(TensorSpec(name, tuple(shape), draw(st.sampled_from(DTYPES))))
    return tuple(specs), ALIGNMENT * draw(st.integers(1, 40))


@settings(max_examples=100, deadline=None)
@given(plans())
@example(((), ALIGNMENT))
@example(((TensorSpec("a", (3, 5000), torch.uint8),), 1024))
def test_every_byte_rides_once_aligned_within_the_buffer_and_in_order(
    plan: tuple[tuple[TensorSpec, ...], int],
) -> None:
    specs, buffer_size = plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_ALONE_NBYTES", LIMIT)
        chunks = lay_out(specs, buffer_size, 3)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert {chunk.root for chunk in chunks} <= {3}
    reached = [0] * len(specs)
    order = []
    shared = []
    for chunk in chunks:
        check_parts(chunk)
        for part in chunk.parts:
            assert part.offset == reached[part.tensor]
            reached[part.tensor] += part.nbytes
            if chunk.needs_slot:
                order.append(part.tensor)
        if chunk.needs_slot:
            shared.append(chunk)
            assert chunk.nbytes <= buffer_size
        else:
            assert len(chunk.parts) == 1
            assert buffer_size <= chunk.nbytes <= max(LIMIT, buffer_size)
    assert reached == [spec.nbytes for spec in specs]
    assert order == sorted(order)
    # No shared chunk is left early: what follows would not have fitted.
    assert all(chunk.nbytes > buffer_size - ALIGNMENT for chunk in shared[:-1])
    slot_nbytes = slot_nbytes_of(chunks)
    assert slot_nbytes % ALIGNMENT == 0
    assert 0 <= slot_nbytes - max((c.nbytes for c in shared), default=0) < ALIGNMENT


def check_parts(chunk: ReplayChunk) -> None:
    """They are aligned, one after the other, and fill the chunk."""
    used = 0
    for part in chunk.parts:
        assert part.nbytes > 0
        assert part.slot_offset % ALIGNMENT == part.offset % ALIGNMENT == 0
        assert 0 <= part.slot_offset - used < ALIGNMENT
        used = part.slot_offset + part.nbytes
    assert 0 < chunk.nbytes == used


def runs_of(chunks: Sequence[ReplayChunk]) -> list[list[tuple[int, int, int, int]]]:
    return [[(p.tensor, p.offset, p.nbytes, p.slot_offset) for p in c.parts] for c in chunks]


def test_a_tensor_that_does_not_fit_goes_on_at_the_start_of_the_next_chunk() -> None:
    chunks = lay_out([flat("a", 100), flat("b", 500), flat("c", 1)], 512, 0)
    assert runs_of(chunks) == [
        [(0, 0, 100, 0), (1, 0, 256, 256)],
        [(1, 256, 244, 0), (2, 0, 1, 256)],
    ]
    assert [chunk.needs_slot for chunk in chunks] == [True, True]


def test_a_tensor_of_a_buffers_size_or_more_rides_alone_and_the_others_fill_up_across_it() -> None:
    chunks = lay_out([flat("a", 100), flat("b", 600), flat("c", 1), flat("d", 512)], 512, 0)
    assert runs_of(chunks) == [[(1, 0, 600, 0)], [(3, 0, 512, 0)], [(0, 0, 100, 0), (2, 0, 1, 256)]]
    assert [chunk.needs_slot for chunk in chunks] == [False, False, True]
    assert slot_nbytes_of(chunks) == 512
    assert slot_nbytes_of(chunks[:2]) == 0


def test_what_rides_alone_is_cut_where_larger_collectives_gain_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "MAX_ALONE_NBYTES", 1024)
    chunks = lay_out([flat("a", 2700)], 512, 0)
    assert runs_of(chunks) == [[(0, 0, 1024, 0)], [(0, 1024, 1024, 0)], [(0, 2048, 652, 0)]]
    chunks = lay_out([flat("a", 2100)], 512, 0)
    assert runs_of(chunks) == [[(0, 0, 1024, 0)], [(0, 1024, 1024, 0)], [(0, 2048, 52, 0)]]
    assert [chunk.needs_slot for chunk in chunks] == [False, False, True]


def sizes_with_ends_of(
    monkeypatch: pytest.MonkeyPatch, end_nbytes: int, specs: Sequence[TensorSpec], buffer_size: int
) -> list[int]:
    monkeypatch.setattr(layout, "END_NBYTES", end_nbytes)
    return [chunk.nbytes for chunk in lay_out(specs, buffer_size, 0)]


def test_large_chunks_at_either_end_are_cut_into_pieces_that_grow_and_shrink(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sizes(nbytes: int, buffer_size: int) -> list[int]:
        specs = [flat(str(i), 1024) for i in range(nbytes // 1024)]
        return sizes_with_ends_of(monkeypatch, 256, specs, buffer_size)

    assert sizes(3 * 4096, 4096) == [256, 768, 3072, 4096, 3072, 768, 256]
    assert sizes(2 * 8192, 8192) == [256, 768, 2304, 4864, 4864, 2304, 768, 256]
    assert sizes(8192, 8192) == [256, 768, 3072, 3072, 768, 256]
    # What is not large is left as it is, as are tensors that need no slot.
    assert sizes(1024, 8192) == [1024]
    specs = [flat("a", 8192), flat("b", 100), flat("c", 512)]
    assert sizes_with_ends_of(monkeypatch, 512, specs, 1024) == [8192, 768]


def test_the_ends_of_a_default_plan_are_not_cut() -> None:
    chunks = lay_out([flat(str(i), 1 << 20) for i in range(200)], 64 << 20, 0)
    assert [chunk.nbytes >> 20 for chunk in chunks] == [64, 64, 64, 8]


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 4))
def test_small_ends_carry_the_same_bytes_in_the_same_order(
    plan: tuple[tuple[TensorSpec, ...], int], units: int
) -> None:
    specs, buffer_size = plan
    whole = lay_out(specs, buffer_size, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "END_NBYTES", units * ALIGNMENT)
        cut = lay_out(specs, buffer_size, 0)
    assert [chunk.index for chunk in cut] == list(range(len(cut)))
    assert joined(cut) == joined(whole)
    assert slot_nbytes_of(cut) <= slot_nbytes_of(whole)
    for chunk in cut:
        check_parts(chunk)


def joined(chunks: Sequence[ReplayChunk]) -> list[tuple[int, int, int]]:
    """The runs of tensors in the order in which they travel; those that go on as one."""
    runs: list[tuple[int, int, int]] = []
    for part in (part for chunk in chunks for part in chunk.parts):
        if runs and runs[-1][0] == part.tensor and runs[-1][2] == part.offset:
            runs[-1] = (part.tensor, runs[-1][1], part.offset + part.nbytes)
        else:
            runs.append((part.tensor, part.offset, part.offset + part.nbytes))
    return runs


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 1024))
def test_a_plan_is_understood_as_it_was_described(
    plan: tuple[tuple[TensorSpec, ...], int], num_buffers: int
) -> None:
    specs, buffer_size = plan
    description = describe(specs, buffer_size, num_buffers)
    assert understand(description) == (specs, buffer_size, num_buffers)
    assert describe(*understand(description)) == description


def hostile(**changes: object) -> bytes:
    return json.dumps(PLAN | changes).encode()


def hostile_tensor(*fields: object) -> bytes:
    return hostile(tensors=[list(fields)])


# What the types alone refuse is below, in the property test.
HOSTILE = {
    "no text": b"\xff\xfe\x00",
    "no json": b"{",
    "deep": b"[" * 100_000,
    "deep tensors": b'{"tensors":' + b"[" * 100_000,
    "a long number": b'{"tensors":[["a",[' + b"9" * 5000 + b'],"uint8",null]]}',
    "infinite": b'{"tensors":[["a",[1e999],"uint8",null]],"buffer_size":512,"num_buffers":1}',
    "negative": hostile_tensor("a", [-1], "uint8", None),
    "not whole": hostile_tensor("a", [1.5], "uint8", None),
    "true": hostile_tensor("a", [True], "uint8", None),
    "huge": hostile_tensor("a", [1 << 60], "uint8", None),
    "huge together": hostile_tensor("a", [1 << 40, 1 << 40], "uint8", None),
    "huge by its dtype": hostile_tensor("a", [1 << 48], "complex128", None),
    "huge but empty": hostile_tensor("a", [0, 1 << 40, 1 << 40], "uint8", None),
    "huge in sum": hostile(tensors=[[str(i), [1 << 44], "uint8", None] for i in range(99)]),
    "of many dimensions": hostile_tensor("a", [1] * 1000, "uint8", None),
    "of countless chunks": hostile(tensors=[["a", [1 << 44], "uint8", None]], buffer_size=256),
    "a module": hostile_tensor("a", [1], "onnx", None),
    "a private name": hostile_tensor("a", [1], "__dict__", None),
    "a younger dtype": hostile_tensor("a", [1], "float2_e1m0", None),
    "quantized": hostile_tensor("a", [1], "qint8", None),
    "two of a name": hostile(tensors=[PLAN["tensors"][0]] * 2),
    "tied to nothing": hostile_tensor("a", [1], "uint8", "b"),
    "tied to itself": hostile_tensor("a", [1], "uint8", "a"),
    "tied to a later one": hostile(tensors=PLAN["tensors"][::-1]),
    "tied to a tied one": hostile(tensors=[*PLAN["tensors"], ["c", [2, 3], "float32", "b"]]),
    "tied, other shape": hostile(tensors=[PLAN["tensors"][0], ["b", [3, 2], "float32", "a"]]),
    "tied, other dtype": hostile(tensors=[PLAN["tensors"][0], ["b", [2, 3], "int32", "a"]]),
    "unaligned buffers": hostile(buffer_size=300),
    "huge buffers": hostile(buffer_size=1 << 41),
    "no buffers": hostile(num_buffers=0),
    "countless buffers": hostile(num_buffers=1 << 20),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_description_is_a_transfer_error_and_nothing_else(kind: str) -> None:
    assert understand(hostile())[1:] == (512, 2), "only the change makes it invalid"
    with pytest.raises(TransferError, match="the sender's plan is invalid") as caught:
        understand(HOSTILE[kind])
    assert len(str(caught.value)) < 300


def test_a_name_for_a_dtype_imports_nothing() -> None:
    before = set(sys.modules)
    for name in ("onnx", "_dynamo", "_inductor", "_export"):
        with pytest.raises(ValueError, match="no dtype"):
            dtype_called(name)
    assert set(sys.modules) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_in_a_description_it_is_a_plan_or_a_transfer_error(data: st.DataObject) -> None:
    plan = json.loads(json.dumps(PLAN))
    field = data.draw(st.sampled_from(["tensors", "buffer_size", "num_buffers", "tensor", "field"]))
    if field == "tensor":
        plan["tensors"][data.draw(st.integers(0, 1))] = data.draw(JSON)
    elif field == "field":
        tensor = plan["tensors"][data.draw(st.integers(0, 1))]
        tensor[data.draw(st.integers(0, 3))] = data.draw(JSON)
    else:
        plan[field] = data.draw(JSON)
    try:
        specs, buffer_size, num_buffers = understand(json.dumps(plan).encode())
    except TransferError:
        return
    check_plan(specs, buffer_size, num_buffers)
    assert sum(chunk.nbytes for chunk in lay_out(specs, buffer_size, 0)) <= 1 << 48


def test_tensors_that_are_one_in_memory_are_tied_and_no_others() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    tensors = {
        "embed": weight,
        "head": weight,
        "alias": weight.detach(),
        "transposed": weight.t(),
        "half": weight[:2],
        "bits": weight.detach().view(torch.int32),
        "equal": torch.zeros(4, 4),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(0, 4),
        "scalar": weight.detach()[0, 0],
    }
    tied = {spec.name: spec.same_as for spec in specs_of(tensors) if spec.same_as}
    assert tied == {"head": "embed", "alias": "embed"}
    check_plan(specs_of(tensors), 512, 1)


def test_a_tied_tensor_has_no_bytes_of_its_own() -> None:
    weight = torch.zeros(1000)
    untied, tied = ({"a": weight}, {"a": weight, "b": weight})
    assert [lay_out(specs_of(each), 512, 0) for each in (untied, tied)] == [
        lay_out([TensorSpec("a", (1000,), torch.float32)], 512, 0)
    ] * 2
