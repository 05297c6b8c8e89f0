"""Replays: exact over many rounds in every shape, bounded, and all ends told when plans differ.

Ranks are threads over real gloo; where only one end matters, the other is a recording.
"""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packcast.errors import PackcastError, TransferError, UsageError
from packcast.packed import replay
from packcast.packed.layout import TensorSpec, lay_out, specs_of
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.ring import Broadcast
from tests.helpers.ranks import run_ranks
from tests.packed.tables import move_by_rows
from tests.packed.test_compat_errors import REFUSED
from tests.packed.wire_model import (
    DTYPES,
    LAYOUTS,
    Item,
    Player,
    Recorder,
    assert_same,
    items_and_limits,
)

BUFFER = 512
AGREEMENT = 3  # broadcasts before the first chunk, where only the sender shows its plan

Tensors = dict[str, torch.Tensor]


class Bare:
    """A communicator as engines have it, over gloo, that counts what it carries."""

    device = torch.device("cpu")

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self.sizes: list[int] = []
        self.fail_at: int | None = None

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if len(self.sizes) == self.fail_at:
            self.fail_at = None
            raise OSError("the network is down")
        self.sizes.append(tensor.numel())
        self._broadcast(tensor, src)


class Knowing(Bare):
    """One that also tells ranks."""

    def __init__(self, broadcast: Broadcast, rank: int, world_size: int) -> None:
        super().__init__(broadcast)
        self.rank, self.world_size = rank, world_size


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, however they lie."""
    dense = tensor.clone(memory_format=torch.contiguous_format)
    return bytes(dense.flatten().view(torch.uint8).tolist()) if dense.numel() else b""


def kept(items: Sequence[Item]) -> Tensors:
    return {item.name: item.tensor() for item in items}


def blank(items: Sequence[Item]) -> Tensors:
    """Tensors to receive into, laid out alike, of other values."""
    poison = [Item(i.name, i.dtype, i.shape, bytes(len(i.payload)), i.layout) for i in items]
    return kept(poison)


def flipped(item: Item, turn: int) -> Item:
    """The same with other values, whichever the turn."""
    mask = turn & 1 if item.dtype == torch.bool else turn & 0xFF
    payload = bytes(byte ^ mask for byte in item.payload)
    return Item(item.name, item.dtype, item.shape, payload, item.layout)


def change(tensors: Mapping[str, torch.Tensor], items: Sequence[Item]) -> None:
    """Give the tensors, in place, the items' values."""
    for item in items:
        if item.payload:
            tensors[item.name].copy_(item.tensor())


def mixed() -> list[Item]:
    """Every width, 0-dim, empty, odd sizes, odd layouts, and some larger than a buffer."""
    shapes = ((3, 1, 2), (), (0, 3), (7,), (9, 31), (1,), (400, 2))
    items = []
    for i, dtype in enumerate(DTYPES):
        shape = shapes[i % len(shapes)]
        payload = bytes((i + at) % 2 for at in range(math.prod(shape) * dtype.itemsize))
        items.append(Item(f"t{i}", dtype, shape, payload, LAYOUTS[i % len(LAYOUTS)]))
    return items


def record(
    tensors: Mapping[str, torch.Tensor] | Sequence[TensorSpec], num_buffers: int = 2
) -> tuple[ReplaySender, Recorder]:
    recorder = Recorder()
    return ReplaySender(tensors, recorder, 0, buffer_size=BUFFER, num_buffers=num_buffers), recorder


@contextmanager
def copying(way: str) -> Iterator[None]:
    """Pairs made meanwhile copy as they do on a GPU with Triton, by tables, or plainly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "move_on", lambda device: move_by_rows if way == "table" else None)
        yield


@pytest.fixture(params=["plain", "table"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each way of copying."""
    with copying(request.param):
        yield


# What arrives


@settings(max_examples=150, deadline=None)
@given(items_and_limits(), st.integers(1, 4), st.integers(1, 8), st.booleans(), st.booleans())
@example(([], 0), 2, 1, False, True)
@example(([Item("e", torch.float64, (0, 3), b"")] * 1, 0), 1, 1, True, True)
def test_generated_mixes_arrive_exactly_round_after_round(
    mix: tuple[list[Item], int], num_buffers: int, blocks: int, in_place: bool, by_table: bool
) -> None:
    items = mix[0]
    tensors, recorder = kept(items), Recorder()
    with copying("table" if by_table else "plain"):
        sender = ReplaySender(
            tensors, recorder, 0, buffer_size=256 * blocks, num_buffers=num_buffers
        )
    rounds = [[flipped(item, turn) for item in items] for turn in range(3)]
    for values in rounds:
        change(tensors, values)
        sender.send(tensors)
    player = Player(recorder.wire)
    with copying("table" if by_table else "plain"):
        receiver = ReplayReceiver(player, 0)
    target = blank(items) if in_place else None
    for values in rounds:
        received = receiver.receive(target)
        assert [bytes_of(received[i.name]) for i in values] == [i.payload for i in values]
        assert all(received[name] is tensor for name, tensor in (target or {}).items())
    assert not player.left


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_travels_from_and_to_every_layout(dtype: torch.dtype, layout: str) -> None:
    payload = bytes(i % 2 for i in range(6 * dtype.itemsize))
    item = Item("t", dtype, (3, 1, 2), payload, layout)
    sender, recorder = record({"t": item.tensor()})
    sender.send({"t": item.tensor()})
    target = blank([item])
    ReplayReceiver(Player(recorder.wire), 0).receive(target)
    assert bytes_of(target["t"]) == payload
    assert_same([item], list(ReplayReceiver(Player(recorder.wire), 0).receive().items()))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_buffers", [1, 2, 3, 4])
@pytest.mark.parametrize("tells_ranks", [True, False])
def test_changing_values_reach_every_rank_in_every_way_of_receiving(
    num_buffers: int, tells_ranks: bool
) -> None:
    items, src, rounds = mixed(), 1, 5

    def body(rank: int, broadcast: Broadcast) -> list[int]:
        group = Knowing(broadcast, rank, 4) if tells_ranks else Bare(broadcast)
        tensors = kept(items) if rank == src else blank(items)
        if rank == src:
            sender = ReplaySender(tensors, group, src, buffer_size=BUFFER, num_buffers=num_buffers)
        else:
            receiver = ReplayReceiver(group, src, tensors if rank == 2 else None)
            assert receiver.specs == tuple(TensorSpec(i.name, i.shape, i.dtype) for i in items)
        for turn in range(rounds):
            values = [flipped(item, turn) for item in items]
            if rank == src:
                change(tensors, values)
                sender.send(tensors)
                change(tensors, [flipped(item, 77) for item in items])
                continue
            called: list[tuple[str, torch.Tensor]] = []
            received = receiver.receive(
                tensors if rank == 2 else None,
                callback=None if rank == 0 else lambda *pair, to=called: to.append(pair),
            )
            assert list(received) == [item.name for item in items]
            if rank != 0:
                assert [name for name, _ in called] == list(received)
                assert all(received[name] is tensor for name, tensor in called)
            assert [bytes_of(t) for t in received.values()] == [v.payload for v in values]
            if rank != 2:
                assert_same(values, list(received.items()))
        return group.sizes

    sizes = run_ranks(4, body, 20)
    assert sizes == [sizes[0]] * 4
    chunks = lay_out(specs_of(kept(items)), BUFFER, src)
    assert sizes[0][-len(chunks) * rounds :] == [chunk.nbytes for chunk in chunks] * rounds
    assert len(sizes[0]) == len(chunks) * rounds + 2 + (4 if tells_ranks else 1)


def test_what_was_received_stays_right_when_it_is_kept() -> None:
    items = mixed()
    sender, recorder = record(tensors := kept(items))
    for turn in range(3):
        change(tensors, [flipped(item, turn) for item in items])
        sender.send(tensors)
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    rounds = [receiver.receive() for _ in range(3)]
    for turn, received in enumerate(rounds):
        assert_same([flipped(item, turn) for item in items], list(received.items()))


def test_plans_can_be_made_from_specs_alone() -> None:
    item = Item("t", torch.float32, (300,), bytes(range(240)) * 5)
    sender, recorder = record([TensorSpec("t", (300,), torch.float32)])
    sender.send({"t": item.tensor(), "beside": torch.zeros(3)})
    assert_same([item], list(ReplayReceiver(Player(recorder.wire), 0).receive().items()))


def test_parameters_that_require_grad_are_sent_from_and_received_into() -> None:
    model, copy = torch.nn.Linear(9, 5), torch.nn.Linear(9, 5)
    sender, recorder = record(dict(model.named_parameters()))
    sender.send(dict(model.named_parameters()))
    ReplayReceiver(Player(recorder.wire), 0).receive(dict(copy.named_parameters()))
    assert torch.equal(model.weight, copy.weight)
    assert torch.equal(model.bias, copy.bias)
    assert copy.weight.requires_grad
    assert copy.weight.is_leaf


# Agreement


def both_ends(
    sent: Tensors,
    expected: Sequence[Mapping[str, torch.Tensor] | Sequence[TensorSpec] | None],
    *,
    tells_ranks: bool,
) -> list[PackcastError | None]:
    """What each rank says when the pair is made: rank 0 sends, the others expect."""

    def body(rank: int, broadcast: Broadcast) -> PackcastError | None:
        world_size = 1 + len(expected)
        group = Knowing(broadcast, rank, world_size) if tells_ranks else Bare(broadcast)
        try:
            if rank == 0:
                ReplaySender(sent, group, 0, buffer_size=BUFFER, num_buffers=2)
            else:
                ReplayReceiver(group, 0, expected[rank - 1])
        except TransferError as error:
            return error
        return None

    began = time.monotonic()
    said = run_ranks(1 + len(expected), body, 20)
    assert time.monotonic() - began < 10
    return said


A, B = torch.zeros(2, 3), torch.zeros(5, dtype=torch.int64)
UNLIKE = {
    "name": ({"a": A, "c": B}, "c torch.int64"),
    "order": ({"b": B, "a": A}, "b torch.int64"),
    "shape": ({"a": A.t(), "b": B}, r"a torch.float32 \(3, 2\)"),
    "dtype": ({"a": A, "b": B.double()}, "b torch.float64"),
    "fewer": ({"a": A}, "1 tensors where the sender has 2"),
    "more": ({"a": A, "b": B, "c": B}, "3 tensors where the sender has 2"),
    "none": ({}, "0 tensors where the sender has 2"),
}


@pytest.mark.parametrize("tells_ranks", [True, False])
def test_equal_plans_agree_however_they_are_expected(tells_ranks: bool) -> None:
    like = {"a": torch.empty(2, 3, device="meta"), "b": B}
    assert both_ends({"a": A, "b": B}, [like, None, specs_of(like)], tells_ranks=tells_ranks) == (
        [None] * 4
    )


@pytest.mark.parametrize("kind", UNLIKE)
def test_all_ranks_raise_together_where_one_expects_another_plan(kind: str) -> None:
    wrong, what = UNLIKE[kind]
    right = {"a": A, "b": B}
    said = both_ends(right, [right, wrong, None], tells_ranks=True)
    assert all(isinstance(error, TransferError) for error in said)
    for rank in (0, 1, 3):
        assert str(said[rank]) == "rank 2 expects another plan"
    with pytest.raises(TransferError, match=f"this receiver expects another plan: {what}"):
        raise said[2] or AssertionError


def test_several_that_expect_another_plan_are_all_named() -> None:
    right, wrong = {"a": A, "b": B}, {"a": A}
    said = both_ends(right, [wrong, right, wrong], tells_ranks=True)
    assert str(said[0]) == str(said[2]) == "ranks 1, 3 expect another plan"


def test_where_ranks_are_not_told_only_the_receiver_knows_and_nobody_hangs() -> None:
    right, wrong = {"a": A, "b": B}, {"a": A}
    said = both_ends(right, [right, wrong, None], tells_ranks=False)
    assert [said[0], said[1], said[3]] == [None] * 3
    assert "this receiver expects another plan: 1 tensors" in str(said[2])


def test_a_plan_that_one_receiver_cannot_understand_ends_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    understand, turns = replay.understand, iter(range(9))

    def older(description: bytes) -> object:
        if next(turns) == 0:
            raise TransferError("the sender's plan cannot be understood: no dtype 'float2'")
        return understand(description)

    monkeypatch.setattr(replay, "understand", older)
    said = [str(error) for error in both_ends({"a": A}, [None, None], tells_ranks=True)]
    assert sorted("cannot be understood" in error for error in said) == [False, False, True]
    assert sorted(error.endswith("expects another plan") for error in said) == [False, True, True]


@pytest.mark.parametrize(
    "wire", [b"packrep1" + bytes(7) + b"9", b"packrep2" + b"\xff" * 8, bytes(16)]
)
def test_who_is_no_replay_sender_is_told_from_one(wire: bytes) -> None:
    with pytest.raises(TransferError, match="rank 0 is no replay sender"):
        ReplayReceiver(Player([wire]), 0)


def test_a_sender_of_no_plan_at_all_is_no_replay_sender() -> None:
    with pytest.raises(TransferError, match="rank 0 is no replay sender"):
        ReplayReceiver(Player([b"packrep2" + bytes(8)]), 0)


@pytest.mark.parametrize(
    ("buffer_size", "num_buffers"), [(0, 2), (255, 2), (257, 2), (512, 0), (512, -1), (512, 5000)]
)
def test_buffers_that_make_no_ring_are_refused_before_anything_moves(
    buffer_size: int, num_buffers: int
) -> None:
    recorder = Recorder()
    with pytest.raises(UsageError, match="buffer"):
        ReplaySender({"a": A}, recorder, 0, buffer_size=buffer_size, num_buffers=num_buffers)
    assert not recorder.wire


# Other tensors than last time


def last_values(recorder: Recorder, name: str) -> list[float]:
    """What a receiver has after everything that was sent."""
    receiver = ReplayReceiver(player := Player(recorder.wire), 0)
    received: Tensors = {}
    while player.left:
        received = receiver.receive()
    return [float(value) for value in received[name].flatten()]


@pytest.mark.parametrize("stride", [1, 2])
def test_another_tensor_of_the_same_name_is_the_one_that_is_sent(stride: int) -> None:
    def make(value: float) -> Tensors:
        return {"w": torch.full((4 * stride,), value)[::stride]}

    first = make(1)
    sender, recorder = record(first)
    for tensors, value in ((first, 1), (make(2), 2), (first, 1), (make(3), 3)):
        sender.send(tensors)
        assert last_values(recorder, "w") == [value] * 4


@pytest.mark.parametrize("stride", [1, 2])
def test_data_that_was_swapped_is_what_is_sent(stride: int) -> None:
    weight = torch.nn.Parameter(torch.ones(4 * stride)[::stride])
    sender, recorder = record({"w": weight})
    sender.send({"w": weight})
    weight.data = torch.full((4 * stride,), 2.0)[::stride]
    sender.send({"w": weight})
    assert last_values(recorder, "w") == [2] * 4


@pytest.mark.parametrize("stride", [1, 2])
def test_data_that_was_swapped_is_what_is_received_into(stride: int) -> None:
    sender, recorder = record({"w": torch.ones(4)})
    sender.send({"w": torch.ones(4)})
    sender.send({"w": torch.full((4,), 2.0)})
    weight = torch.nn.Parameter(torch.zeros(4 * stride)[::stride])
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    receiver.receive({"w": weight})
    before, weight.data = weight.data, torch.zeros(4 * stride)[::stride]
    receiver.receive({"w": weight})
    assert (before.tolist(), weight.tolist()) == ([1] * 4, [2] * 4)


def test_data_that_was_turned_in_place_is_sent_as_it_lies_now() -> None:
    weight = torch.nn.Parameter(torch.arange(4.0).view(2, 2))
    sender, recorder = record({"w": weight})
    sender.send({"w": weight})
    weight.data = weight.data.t()
    sender.send({"w": weight})
    assert last_values(recorder, "w") == [0, 2, 1, 3]


def reload(tensor: torch.Tensor, value: float) -> list[torch.Tensor]:
    """Free the tensor's storage and fill it again, elsewhere, as offloading does to weights.

    Keep what is returned: where they lay before, with other values in it.
    """
    storage = tensor.untyped_storage()
    before, nbytes = tensor.data_ptr(), storage.nbytes()
    storage.resize_(0)
    kept = [torch.full((nbytes // 4,), -1.0) for _ in range(8)]
    storage.resize_(nbytes)
    assert tensor.data_ptr() != before, "it came back to the same place"
    tensor.fill_(value)
    return kept


@pytest.mark.usefixtures("way")
def test_a_storage_that_was_offloaded_and_reloaded_is_sent_from_where_it_is_now() -> None:
    weights = torch.full((40,), 1.0)
    tensors = {"v": weights[:3], "w": weights[3:]}
    sender, recorder = record(tensors)
    sender.send(tensors)
    kept = reload(weights, 2)
    sender.send(tensors)
    assert kept
    assert last_values(recorder, "w") == [2] * 37


@pytest.mark.usefixtures("way")
def test_a_storage_that_was_offloaded_and_reloaded_is_received_into_where_it_is_now() -> None:
    sender, recorder = record({"v": torch.ones(3), "w": torch.ones(37)})
    for value in (1.0, 2.0):
        sender.send({"v": torch.full((3,), value), "w": torch.full((37,), value)})
    weights = torch.zeros(40)
    into = {"v": weights[:3], "w": weights[3:]}
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    receiver.receive(into)
    kept = reload(weights, 0)
    receiver.receive(into)
    assert weights.tolist() == [2] * 40
    assert all(bool((other == -1).all()) for other in kept)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda old: old.view(3, 2), r"w is torch.float32 \(3, 2\), but torch.float32 \(2, 3\)"),
        (lambda old: old[:1], r"w is torch.float32 \(1, 3\), but"),
        (lambda old: old.view(torch.int32), r"w is torch.int32 \(2, 3\), but torch.float32"),
    ],
)
def test_a_shape_or_dtype_that_changed_between_sends_is_an_error_with_the_name(
    other: Callable[[torch.Tensor], torch.Tensor], what: str, in_place: bool
) -> None:
    weight = torch.ones(2, 3)
    sender, recorder = record({"w": weight})
    sender.send({"w": weight})
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    target = torch.zeros(2, 3)
    receiver.receive({"w": target})
    for end, tensor in ((sender.send, weight), (receiver.receive, target)):
        if in_place:
            tensor.data = other(tensor.data)
        else:
            tensor = other(tensor)
        with pytest.raises(UsageError, match=what):
            end({"w": tensor})
    assert len(recorder.wire) == AGREEMENT + 1


def test_a_state_dict_whose_tensors_are_made_anew_each_time_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = []

    class Counted(replay.Bound):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            bound.append(self)

    model = torch.nn.Linear(3, 3)
    sender, recorder = record(model.state_dict())
    monkeypatch.setattr(replay, "Bound", Counted)
    for value in range(3):
        torch.nn.init.constant_(model.weight, value)
        sender.send(model.state_dict())
    assert len(bound) == 1
    assert last_values(recorder, "weight") == [2] * 9


# Ties


def test_tied_weights_travel_once_and_are_one_where_they_arrive() -> None:
    weight = torch.nn.Parameter(torch.arange(50.0))
    tied, single = (
        {"embed": weight, "x": torch.ones(3), "head": weight.detach()},
        {
            "embed": weight,
            "x": torch.ones(3),
        },
    )
    sizes = {}
    for which, tensors in (("tied", tied), ("single", single)):
        sender, recorder = record(tensors)
        sender.send(tensors)
        sizes[which] = [len(sent) for sent in recorder.wire[AGREEMENT:]]
        if which == "tied":
            receiver = ReplayReceiver(Player(recorder.wire), 0)
            received = receiver.receive()
            assert received["head"] is received["embed"]
            assert torch.equal(received["head"], weight)
            assert [spec.same_as for spec in receiver.specs] == [None, None, "embed"]
    assert sizes["tied"] == sizes["single"]


def transposed(values: torch.Tensor) -> torch.Tensor:
    return values.t().contiguous().t()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("lay", [torch.clone, transposed], ids=["plain", "transposed"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_ties_are_filled_in_whether_they_are_tied_there_or_not(
    lay: Callable[[torch.Tensor], torch.Tensor], is_tied: bool
) -> None:
    weight = torch.arange(6.0).view(2, 3)
    sender, recorder = record(tied := {"a": weight, "b": weight, "c": weight.detach()})
    sender.send(tied)
    weight.add_(10)
    sender.send(tied)
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    one = lay(torch.zeros(2, 3))
    into = {"a": one} | {
        name: one.detach() if is_tied else lay(torch.zeros(2, 3)) for name in ("b", "c")
    }
    for shift in (0, 10):
        receiver.receive(into)
        for tensor in into.values():
            assert tensor.flatten().tolist() == [shift + i for i in range(6)]


def test_ties_that_have_come_apart_are_an_error_and_not_one_value_for_both() -> None:
    weight = torch.zeros(3)
    sender, recorder = record(tied := {"embed": weight, "head": weight})
    sender.send(tied)
    with pytest.raises(UsageError, match=r"tensor head shares .* embed .* no longer") as caught:
        sender.send({"embed": weight, "head": torch.ones(3)})
    assert caught.value.hint
    assert len(recorder.wire) == AGREEMENT + 1
    moved = torch.full((3,), 2.0)
    sender.send({"embed": moved, "head": moved})
    assert last_values(recorder, "head") == [2] * 3


# Errors


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_plain_bytes_is_refused_by_name(kind: str) -> None:
    make, what, hint = REFUSED[kind]
    refused = make()
    recorder = Recorder()
    with pytest.raises(UsageError, match=f"tensor layer.3.weight .*{what}") as caught:
        ReplaySender({"x": A, "layer.3.weight": refused}, recorder, 0)
    assert hint is None or hint in str(caught.value.hint)
    assert not recorder.wire
    sender, recorder = record({"layer.3.weight": A})
    sender.send({"layer.3.weight": A})
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    for end in (sender.send, receiver.receive, sender.send, receiver.receive):
        what_is_said = "is not given" if refused is None else what
        with pytest.raises(UsageError, match=f"tensor layer.3.weight .*{what_is_said}"):
            end({"layer.3.weight": refused})
    receiver.receive()


def test_a_tensor_of_the_plan_that_is_not_given_is_named() -> None:
    sender, recorder = record({"a": A, "b": B})
    with pytest.raises(UsageError, match="tensor b of the plan is not given"):
        sender.send({"a": A})
    sender.send({"a": A, "b": B})
    with pytest.raises(UsageError, match="tensor b of the plan is not given"):
        sender.send({"a": A})
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    with pytest.raises(UsageError, match="tensor b of the plan is not given"):
        receiver.receive({"a": torch.zeros(2, 3)})
    receiver.receive()


def test_an_error_of_the_group_comes_out_as_it_is_and_leaves_the_pair_usable() -> None:
    items, fails = mixed(), (2, 1)  # which chunk, in which round

    def body(rank: int, broadcast: Broadcast) -> None:
        group = Knowing(broadcast, rank, 2)
        tensors = kept(items) if rank == 0 else blank(items)
        if rank == 0:
            sender = ReplaySender(tensors, group, 0, buffer_size=BUFFER, num_buffers=2)
        else:
            receiver = ReplayReceiver(group, 0)
        for turn in range(4):
            values = [flipped(item, turn) for item in items]
            if rank == 0:
                change(tensors, values)
            failing = turn == fails[1]
            if failing:
                group.fail_at = len(group.sizes) + fails[0]
            with pytest.raises(OSError, match="the network is down") if failing else nullcontext():
                if rank == 0:
                    sender.send(tensors)
                else:
                    receiver.receive(tensors)
            if rank != 0 and not failing:
                assert [bytes_of(t) for t in tensors.values()] == [v.payload for v in values]

    run_ranks(2, body, 20)


def test_an_error_of_the_callback_comes_out_as_it_is_and_leaves_the_pair_usable() -> None:
    sender, recorder = record({"a": A, "b": B})
    for _ in range(2):
        sender.send({"a": A, "b": B})

    def refuse(name: str, tensor: torch.Tensor) -> None:
        raise LookupError(name)

    receiver = ReplayReceiver(Player(recorder.wire), 0)
    with pytest.raises(LookupError, match="a"):
        receiver.receive(callback=refuse)
    assert list(receiver.receive()) == ["a", "b"]


def test_a_send_that_was_refused_can_be_made_good() -> None:
    def body(rank: int, broadcast: Broadcast) -> None:
        group = Knowing(broadcast, rank, 2)
        if rank == 0:
            sender = ReplaySender({"a": A}, group, 0, buffer_size=BUFFER, num_buffers=1)
            with pytest.raises(UsageError, match="tensor a"):
                sender.send({"a": A.t()})
            sender.send({"a": A + 4})
        else:
            receiver = ReplayReceiver(group, 0)
            with pytest.raises(UsageError, match="tensor a"):
                receiver.receive({"a": A.t()})
            assert torch.equal(receiver.receive()["a"], A + 4)

    run_ranks(2, body, 20)


# Memory


@pytest.mark.parametrize("num_buffers", [1, 2, 4])
@pytest.mark.parametrize(
    ("sizes", "slot"),
    [
        ((0,), 0),
        ((3,), 256),
        ((300, 100), 512),
        ((511, 511, 511), 512),
        ((512,), 0),
        ((100_000,), 0),
        ((100_000, 7), 256),
    ],
)
def test_the_ring_is_no_larger_than_its_buffers_or_the_largest_chunk_that_needs_a_slot(
    sizes: Sequence[int], slot: int, num_buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = replay.Ring

    def ring(device: torch.device, slot_nbytes: int, count: int) -> object:
        made.append(slot_nbytes * count)
        return real(device, slot_nbytes, count)

    monkeypatch.setattr(replay, "Ring", ring)
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    sender, recorder = record(tensors, num_buffers)
    sender.send(tensors)
    ReplayReceiver(Player(recorder.wire), 0).receive()
    assert made == [slot * num_buffers] * 2
    wire = [chunk.nbytes for chunk in lay_out(sender.specs, BUFFER, 0)]
    assert list(map(len, recorder.wire[AGREEMENT:])) == wire


def test_a_receiver_does_not_hold_on_to_what_it_has_handed_out() -> None:
    sender, recorder = record({"a": A})
    sender.send({"a": A})
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    received = weakref.ref(receiver.receive()["a"].untyped_storage())
    gc.collect()
    assert received() is None
