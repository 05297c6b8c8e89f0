"""Replays whose tensors changed since the last run, or moved: the current ones count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from packcast.errors import UsageError
from packcast.packed import replay
from packcast.packed.replay import ReplayReceiver
from tests.packed.replays import AGREEMENT, last_values, record
from tests.packed.wire_model import Player


@pytest.mark.parametrize("stride", [1, 2])
def test_another_tensor_or_data_of_the_same_name_is_what_is_sent(stride: int) -> None:
    def make(value: float) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.full((4 * stride,), value)[::stride])

    first = make(1.0)
    sender, recorder = record({"w": first})
    for weight, value in ((first, 1), (make(2.0), 2), (first, 1), (make(3.0), 3)):
        sender.send({"w": weight})
        assert last_values(recorder, "w") == [value] * 4
    first.data = make(4.0).data
    sender.send({"w": first})
    assert last_values(recorder, "w") == [4] * 4


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
    """Free the tensor's storage and fill it again elsewhere, as offloading does to weights.

    Returns tensors that cover the old memory, with other values.
    """
    storage = tensor.untyped_storage()
    before, nbytes = tensor.data_ptr(), storage.nbytes()
    kept: list[torch.Tensor] = []
    for _ in range(99):  # the allocator may give the same place again
        storage.resize_(0)
        kept += [torch.full((nbytes // 4,), -1.0) for _ in range(8)]
        storage.resize_(nbytes)
        if tensor.data_ptr() != before:
            break
    assert tensor.data_ptr() != before, "it came back to the same place"
    tensor.fill_(value)
    return kept


@pytest.mark.usefixtures("copies")
def test_a_storage_that_was_offloaded_and_reloaded_is_sent_from_where_it_is_now() -> None:
    weights = torch.full((40,), 1.0)
    tensors = {"v": weights[:3], "w": weights[3:]}
    sender, recorder = record(tensors)
    sender.send(tensors)
    kept = reload(weights, 2)
    sender.send(tensors)
    assert kept
    assert last_values(recorder, "w") == [2] * 37


@pytest.mark.usefixtures("copies")
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
