"""Replays' short ways: tensors bound once, and chunks that are broadcast from where they lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from packcast.errors import UsageError
from packcast.packed import layout, replay
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.ring import Broadcast
from tests.helpers.ranks import run_ranks
from tests.packed.replays import (
    AGREEMENT,
    BUFFER,
    Knowing,
    blank,
    bytes_of,
    change,
    copying,
    flipped,
    kept,
    mixed,
    record,
)
from tests.packed.tables import move_by_rows
from tests.packed.wire_model import Player, Recorder

LARGE = 2 * BUFFER  # bytes; it rides alone
Lay = Callable[[torch.Tensor], torch.Tensor]


def transposed(values: torch.Tensor) -> torch.Tensor:
    return values.view(8, -1).t().contiguous().t()


def askew(values: torch.Tensor) -> torch.Tensor:
    """Contiguous, a byte off."""
    return torch.zeros(len(values) + 1, dtype=torch.uint8)[1:].copy_(values).view(8, -1)


def plain(values: torch.Tensor) -> torch.Tensor:
    return values.clone().view(8, -1)


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


class Watching(Recorder):
    """Also where what is broadcast lies."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        super().broadcast(tensor, src)
        self.places.append(tensor.data_ptr())


class WatchingPlayer(Player):
    """The same for a receiver."""

    places: tuple[int, ...] = ()

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        super().broadcast(tensor, src)
        self.places += (tensor.data_ptr(),)


# Where they lie


def test_large_tensors_are_sent_from_where_they_lie_and_land_there() -> None:
    values = {"small": random_bytes(9), "large": random_bytes(LARGE), "exact": random_bytes(BUFFER)}
    group = Watching()
    sender = ReplaySender(values, group, 0, buffer_size=BUFFER, num_buffers=2)
    sender.send(values)
    assert group.places[AGREEMENT:][:2] == [values["large"].data_ptr(), values["exact"].data_ptr()]
    player = WatchingPlayer(group.wire)
    into = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    ReplayReceiver(player, 0).receive(into)
    assert list(player.places[AGREEMENT:][:2]) == [into[n].data_ptr() for n in ("large", "exact")]
    assert all(torch.equal(into[name], tensor) for name, tensor in values.items())


@pytest.mark.parametrize("send_lay", [plain, transposed, askew])
@pytest.mark.parametrize("receive_lay", [plain, transposed, askew])
def test_each_end_has_a_copy_only_where_its_own_large_tensor_lies_badly(
    send_lay: Lay, receive_lay: Lay
) -> None:
    first, second = random_bytes(LARGE), random_bytes(LARGE)
    sent, group = send_lay(first), Watching()
    sender = ReplaySender({"w": sent}, group, 0, buffer_size=BUFFER, num_buffers=2)
    sender.send({"w": sent})
    sent.copy_(second.view(8, -1))
    sender.send({"w": sent})
    assert {place == sent.data_ptr() for place in group.places[AGREEMENT:]} == {send_lay is plain}
    player = WatchingPlayer(group.wire)
    receiver, into = ReplayReceiver(player, 0), receive_lay(torch.zeros_like(first))
    for values in (first, second):
        receiver.receive({"w": into})
        assert torch.equal(into, values.view(8, -1))
    is_there = {place == into.data_ptr() for place in player.places[AGREEMENT:]}
    assert is_there == {receive_lay is plain}
    assert {place % 16 for place in (*player.places, *group.places)[AGREEMENT:]} == {0}


# The share of a GPU that copies take


def test_only_copies_that_no_broadcast_runs_beside_may_fill_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first ones in, and the last ones out."""
    moves: list[tuple[bool, bool]] = []

    def watched(
        table: torch.Tensor, slot: torch.Tensor, *, into_slot: bool, alone: bool = False
    ) -> None:
        moves.append((into_slot, alone))
        move_by_rows(table, slot, into_slot=into_slot)

    monkeypatch.setattr(replay, "move_on", lambda device: watched)
    values = {f"small.{i}": random_bytes(BUFFER // 2) for i in range(6)}
    values["large"] = random_bytes(BUFFER)  # which needs no copy, before the third buffer is full
    sender, recorder = record(values)
    sender.send(values)
    assert moves == [(True, True), (True, False), (True, False)]
    moves.clear()
    into = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    ReplayReceiver(Player(recorder.wire), 0).receive(into)
    assert moves == [(False, False), (False, False), (False, True)]
    assert all(torch.equal(into[name], tensor) for name, tensor in values.items())


@pytest.mark.parametrize("how", ["table", "plain"])
def test_large_chunks_cut_at_both_ends_arrive_as_others_do(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(layout, "END_NBYTES", 256)
    values = {f"t.{i}": random_bytes(nbytes) for i, nbytes in enumerate([700, 0, 1, 3000, 2500])}
    into = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    with copying(how):
        recorder = Recorder()
        ReplaySender(values, recorder, 0, buffer_size=4096, num_buffers=2).send(values)
        ReplayReceiver(Player(recorder.wire), 0).receive(into)
    sizes = [len(part) for part in recorder.wire][AGREEMENT:]
    assert len(sizes) > 2  # of 6,660 bytes
    assert sizes[0] == 256
    assert all(torch.equal(into[name], tensor) for name, tensor in values.items())


# Bound


@pytest.mark.parametrize("lay", [plain, transposed, askew])
@pytest.mark.parametrize("nbytes", [LARGE, 64])
def test_bound_tensors_are_sent_as_they_are_then_and_received_into(lay: Lay, nbytes: int) -> None:
    rounds = [random_bytes(nbytes) for _ in range(3)]
    sent = {"w": lay(torch.zeros(nbytes, dtype=torch.uint8)), "beside": torch.ones(3)}
    sender, recorder = record({"w": sent["w"]})
    sender.bind(sent)
    for values in rounds:
        sent["w"].copy_(values.view(8, -1))
        sender.send()
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    into = {"w": lay(torch.zeros(nbytes, dtype=torch.uint8)), "beside": torch.ones(3)}
    receiver.bind(into)
    for values in rounds:
        received = receiver.receive()
        assert list(received) == ["w"]
        assert received["w"] is into["w"]
        assert torch.equal(into["w"], values.view(8, -1))


def test_bound_on_every_rank_of_a_group() -> None:
    items, rounds = mixed(), 4

    def body(rank: int, broadcast: Broadcast) -> None:
        group = Knowing(broadcast, rank, 3)
        tensors = kept(items) if rank == 0 else blank(items)
        end: ReplaySender | ReplayReceiver = (
            ReplaySender(tensors, group, 0, buffer_size=BUFFER, num_buffers=2)
            if rank == 0
            else ReplayReceiver(group, 0)
        )
        if rank != 2:
            end.bind(tensors)
        for turn in range(rounds):
            values = [flipped(item, turn) for item in items]
            if isinstance(end, ReplaySender):
                change(tensors, values)
                end.send()
            else:
                received = end.receive()
                assert [bytes_of(t) for t in received.values()] == [v.payload for v in values]

    run_ranks(3, body, 20)


def test_tensors_given_beside_those_that_are_bound_change_nothing_about_them() -> None:
    bound, other = torch.full((4,), 1.0), torch.full((4,), 2.0)
    sender, recorder = record({"w": bound})
    sender.bind({"w": bound})
    sender.send()
    sender.send({"w": other})
    sender.send()
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    into, beside = torch.zeros(4), torch.zeros(4)
    receiver.bind({"w": into})
    assert receiver.receive()["w"] is into
    assert receiver.receive({"w": beside})["w"] is beside
    assert (into.tolist(), beside.tolist()) == ([1] * 4, [2] * 4)
    beside.zero_()
    receiver.receive()
    assert (into.tolist(), beside.tolist()) == ([1] * 4, [0] * 4)


def test_what_is_bound_last_counts() -> None:
    sender, recorder = record({"w": torch.zeros(2)})
    for value in (1.0, 2.0):
        sender.bind({"w": torch.full((2,), value)})
    sender.send()
    assert ReplayReceiver(Player(recorder.wire), 0).receive()["w"].tolist() == [2, 2]


def test_sending_without_tensors_where_none_are_bound_is_refused() -> None:
    sender, recorder = record({"w": torch.zeros(2)})
    with pytest.raises(UsageError, match="no tensors are bound") as caught:
        sender.send()
    assert caught.value.hint
    assert len(recorder.wire) == AGREEMENT


def test_only_the_plans_tensors_can_be_bound() -> None:
    tied = torch.zeros(2)
    sender, recorder = record({"w": tied, "v": tied})
    with pytest.raises(UsageError, match="tensor v of the plan is not given"):
        sender.bind({"w": tied})
    with pytest.raises(UsageError, match="tensor v shares the memory of w in the plan"):
        sender.bind({"w": tied, "v": torch.zeros(2)})
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    with pytest.raises(UsageError, match=r"tensor w is torch\.float64"):
        receiver.bind({"w": tied.double(), "v": tied})
    assert len(recorder.wire) == AGREEMENT
