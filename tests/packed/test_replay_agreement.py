"""Replays that fail: all ranks know when plans differ, and a pair stays usable after an error.

Ranks are threads over real gloo; where only one end matters, the other is a recording.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import pytest
import torch

from packcast.errors import PackcastError, TransferError, UsageError
from packcast.packed import replay
from packcast.packed.layout import TensorSpec, specs_of
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.ring import Broadcast
from tests.helpers.ranks import run_ranks
from tests.packed.replays import (
    BUFFER,
    A,
    B,
    Bare,
    Knowing,
    Tensors,
    blank,
    bytes_of,
    change,
    flipped,
    kept,
    mixed,
    record,
)
from tests.packed.test_compat_errors import REFUSED
from tests.packed.wire_model import Player, Recorder

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
    errors = run_ranks(1 + len(expected), body, 20)
    assert time.monotonic() - began < 10
    return errors


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
    errors = both_ends(right, [right, wrong, None], tells_ranks=True)
    assert all(isinstance(error, TransferError) for error in errors)
    for rank in (0, 1, 3):
        assert str(errors[rank]) == "rank 2 expects another plan"
    with pytest.raises(TransferError, match=f"this receiver expects another plan: {what}"):
        raise errors[2] or AssertionError


def test_several_that_expect_another_plan_are_all_named() -> None:
    right, wrong = {"a": A, "b": B}, {"a": A}
    errors = both_ends(right, [wrong, right, wrong], tells_ranks=True)
    assert str(errors[0]) == str(errors[2]) == "ranks 1, 3 expect another plan"


def test_without_ranks_only_the_receiver_knows_and_no_rank_hangs() -> None:
    right, wrong = {"a": A, "b": B}, {"a": A}
    errors = both_ends(right, [right, wrong, None], tells_ranks=False)
    assert [errors[0], errors[1], errors[3]] == [None] * 3
    assert "this receiver expects another plan: 1 tensors" in str(errors[2])


def test_a_plan_that_one_receiver_cannot_understand_ends_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    understand, turns = replay.understand, iter(range(9))

    def older(description: bytes) -> object:
        if next(turns) == 0:
            raise TransferError("the sender's plan is invalid: no dtype 'float2'")
        return understand(description)

    monkeypatch.setattr(replay, "understand", older)
    errors = [str(error) for error in both_ends({"a": A}, [None, None], tells_ranks=True)]
    assert sorted("is invalid" in error for error in errors) == [False, False, True]
    assert sorted(error.endswith("expects another plan") for error in errors) == [False, True, True]


@pytest.mark.parametrize(
    "wire",
    [b"packrep2" + bytes(7) + b"9", b"packrep3" + b"\xff" * 8, b"packrep3" + bytes(8), bytes(16)],
)
def test_a_replay_sender_is_recognized(wire: bytes) -> None:
    with pytest.raises(TransferError, match="rank 0 is no replay sender"):
        ReplayReceiver(Player([wire]), 0)


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
