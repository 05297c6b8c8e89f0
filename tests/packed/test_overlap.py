"""Targets that overlap are refused by name; those that only lie between one another are not."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packcast.errors import UsageError
from packcast.packed.overlap import check_apart
from packcast.packed.replay import ReplayReceiver
from tests.packed.replays import record
from tests.packed.wire_model import Player

Tensors = dict[str, torch.Tensor]


def places(tensor: torch.Tensor) -> list[int]:
    """Every byte that it has, one address each."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    steps = [[i * stride for i in range(n)] for n, stride in dims]
    firsts = [tensor.data_ptr() + sum(at) * tensor.itemsize for at in itertools.product(*steps)]
    return [first + i for first in firsts for i in range(tensor.itemsize)]


@st.composite
def views(draw: st.DrawFn) -> list[torch.Tensor]:
    """Some views of one memory, of any strides that fit, and of two dtypes."""
    memory = torch.zeros(48, dtype=torch.uint8)
    made = []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from([torch.uint8, torch.int16]))
        room = len(memory) // dtype.itemsize
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        strides = [draw(st.integers(0, 6)) for _ in shape]
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True) if n)
        if span <= room:
            offset = draw(st.integers(0, room - span))
            made.append(memory.view(dtype).as_strided(shape, strides, offset))
    return made


@given(views())
def test_two_elements_at_one_place_are_found_whatever_the_strides(made: list[torch.Tensor]) -> None:
    tied = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t for t in made if t.numel()}
    taken = [place for tensor in tied.values() for place in places(tensor)]
    # Contiguous ones with the same bytes are one in memory, whatever their shapes.
    same = {(t.data_ptr(), t.nbytes) for t in tied.values() if t.is_contiguous()}
    whole = [t for t in tied.values() if t.is_contiguous()]
    extra = sum(t.nbytes for t in whole) - sum(nbytes for _, nbytes in same)
    overlaps = len(taken) - len(set(taken)) - extra > 0
    targets = {f"t{i}": tensor for i, tensor in enumerate(made)}
    if overlaps:
        with pytest.raises(UsageError, match=r"tensor t\d cannot be received into: "):
            check_apart(targets)
    else:
        check_apart(targets)


FUSED = torch.zeros(4, 6)

REFUSED: dict[str, tuple[Tensors, str]] = {
    "expanded": ({"w": torch.zeros(1, 3).expand(4, 3)}, "tensor w .* elements of it share memory"),
    "windows": ({"w": torch.zeros(6).unfold(0, 3, 1)}, "tensor w .* elements of it share memory"),
    "halves": (
        {"a": FUSED.view(-1)[:13], "b": FUSED.view(-1)[12:]},
        "tensor b .* shares the memory of a",
    ),
    "columns": ({"a": FUSED[:, :4], "b": FUSED[:, 3:]}, "tensor . .* shares the memory of ."),
    "part": ({"all": FUSED, "row": FUSED[2]}, "tensor row .* shares the memory of all"),
    "three": (
        {"a": FUSED[:, :2], "b": FUSED[:, 2:4], "c": FUSED[1:3, 3:5]},
        "tensor c .* shares the memory of b",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_receiver_refuses_targets_that_overlap_before_anything_moves(kind: str) -> None:
    targets, says = REFUSED[kind]
    given = {name: torch.ones(tensor.shape) for name, tensor in targets.items()}
    sender, recorder = record(given)
    sender.send(given)
    receiver = ReplayReceiver(player := Player(recorder.wire), 0)
    before, left = {name: t.clone() for name, t in targets.items()}, len(player.left)
    for end in (receiver.bind, receiver.receive):
        with pytest.raises(UsageError, match=says):
            end(targets)
    assert len(player.left) == left
    assert all(torch.equal(targets[name], before[name]) for name in targets)
    assert all(torch.equal(t, given[name]) for name, t in receiver.receive().items())


def test_a_receiver_takes_slices_of_one_memory_and_tied_tensors() -> None:
    fused, tied = torch.zeros(4, 6), torch.zeros(5)
    targets = {"q": fused[:, :2], "k": fused[:, 2:3], "v": fused[:, 3:], "a": tied, "b": tied}
    given = {name: torch.rand(tensor.shape) for name, tensor in targets.items()}
    given["b"] = given["a"]
    sender, recorder = record(given)
    sender.send(given)
    ReplayReceiver(Player(recorder.wire), 0).receive(targets)
    assert torch.equal(fused, torch.cat([given["q"], given["k"], given["v"]], dim=1))
    assert torch.equal(tied, given["a"])


def test_a_sender_may_be_given_what_overlaps() -> None:
    base = torch.arange(6.0)
    given = {"expanded": torch.ones(1, 3).expand(4, 3), "all": base, "part": base[2:4]}
    sender, recorder = record(given)
    sender.send(given)
    got = ReplayReceiver(Player(recorder.wire), 0).receive()
    assert {name: t.tolist() for name, t in got.items()} == {
        name: t.tolist() for name, t in given.items()
    }
