"""Replays: exact over many rounds in every shape, ties as well, and bounded.

Ranks are threads over real gloo; where only one end matters, the other is a recording.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packcast.errors import UsageError
from packcast.packed import replay
from packcast.packed.layout import TensorSpec, lay_out, specs_of
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.ring import Broadcast
from tests.helpers.ranks import run_ranks
from tests.packed.replays import (
    AGREEMENT,
    BUFFER,
    A,
    Bare,
    Knowing,
    blank,
    bytes_of,
    change,
    copying,
    flipped,
    kept,
    last_values,
    mixed,
    record,
)
from tests.packed.wire_model import (
    Item,
    Player,
    Recorder,
    assert_same,
    items_and_limits,
)

# What arrives


@settings(max_examples=60, deadline=None)
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


@pytest.mark.usefixtures("copies")
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


@pytest.mark.usefixtures("copies")
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
    wire = [chunk.nbytes for chunk in lay_out(sender.specs, BUFFER, 0)]
    assert made == [slot * min(num_buffers, len(wire))] * 2
    assert list(map(len, recorder.wire[AGREEMENT:])) == wire


def test_a_receiver_does_not_hold_on_to_what_it_has_handed_out() -> None:
    sender, recorder = record({"a": A})
    sender.send({"a": A})
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    received = weakref.ref(receiver.receive()["a"].untyped_storage())
    gc.collect()
    assert received() is None
