"""Replays in inference mode, what autograd notices of a receive, and memory that was freed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from packcast.errors import UsageError
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from packcast.packed.replay import ReplayReceiver
from tests.packed.replays import BUFFER, record
from tests.packed.wire_model import Player, Recorder

Tensors = dict[str, torch.Tensor]
Mode = Callable[[], AbstractContextManager[object]]

MODES: dict[str, Mode] = {"inference": torch.inference_mode, "plain": nullcontext}
pytestmark = pytest.mark.usefixtures("copies")


def some(value: float) -> Tensors:
    """One of every way to travel: in a slot, from where it lies, by a stand-in, tied."""
    small = torch.full((5,), value)
    return {
        "small": small,
        "large": torch.full((3 * BUFFER,), value),
        "strided": torch.full((6, 4), value).t(),
        "large strided": torch.full((BUFFER, 3), value).t(),
        "tied": small,
        "one": torch.tensor(value),
    }


def is_all(tensors: Tensors, value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in tensors.values())


@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("bound", MODES)
@pytest.mark.parametrize("made", MODES)
def test_a_pair_works_in_every_mode_in_whichever_it_was_made_bound_and_used(
    made: str, bound: str, used: str
) -> None:
    for other in MODES:
        with MODES[bound]():
            given, into = some(0), some(0)
        with MODES[made]():
            sender, recorder = record(given)
        with MODES[bound]():
            sender.bind(given)
        for turn, mode in enumerate([used, other, used], 1):
            for tensor in given.values():
                with torch.inference_mode():
                    tensor.fill_(turn)
            with MODES[mode]():
                sender.send()
                sender.send(given)
        player = Player(recorder.wire)
        with MODES[made]():
            receiver = ReplayReceiver(player, 0)
        with MODES[bound]():
            receiver.bind(into)
        for turn, mode in enumerate([used, other, used], 1):
            with MODES[mode]():
                assert receiver.receive() is not None
                assert is_all(into, turn)
                assert is_all(receiver.receive(into), turn)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_receiver_makes_is_of_the_callers_mode(mode: str) -> None:
    given = some(3)
    sender, recorder = record(given)
    sender.send(given)
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    with MODES[mode]():
        got = receiver.receive()
    assert is_all(got, 3)
    assert {tensor.is_inference() for tensor in got.values()} == {mode == "inference"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("borrow", [False, True])
def test_the_functions_work_in_every_mode_with_tensors_of_the_other(
    mode: str, *, borrow: bool
) -> None:
    with MODES["plain" if mode == "inference" else "inference"]():
        given = some(2)
    recorder, got = Recorder(), {}

    def keep(tensors: list[tuple[str, torch.Tensor]]) -> None:
        got.update({name: tensor.clone() for name, tensor in tensors})

    described = [(name, (tensor.shape, tensor.dtype)) for name, tensor in given.items()]
    with MODES[mode]():
        packed_broadcast_producer(iter(given.items()), recorder, 0, lambda pair: pair[1], 64, 2)
        packed_broadcast_consumer(
            iter(described), Player(recorder.wire), 0, keep, 64, 2, borrow=borrow
        )
    assert got.keys() == given.keys()
    assert is_all(got, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("binds", [False, True])
def test_autograd_notices_that_a_receive_has_changed_what_it_saved(
    mode: str, *, binds: bool
) -> None:
    given, into = some(2), some(1)
    sender, recorder = record(given)
    for _ in range(2):
        sender.send(given)
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    if binds:
        receiver.bind(into)
    for _ in range(2):
        scale = torch.ones((), requires_grad=True)
        graphs = {name: (tensor * scale).sum() for name, tensor in into.items()}
        before = {name: tensor._version for name, tensor in into.items()}
        with MODES[mode]():
            receiver.receive(None if binds else into)
        assert is_all(into, 2)
        assert all(tensor._version > before[name] for name, tensor in into.items())
        for graph in graphs.values():
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graph.backward()


def test_autograd_notices_it_of_each_object_that_is_given_for_the_same_memory() -> None:
    sender, recorder = record({"w": torch.ones(3)})
    for _ in range(2):
        sender.send({"w": torch.ones(3)})
    receiver = ReplayReceiver(Player(recorder.wire), 0)
    weight = torch.zeros(3)
    receiver.receive({"w": weight.data})  # which has another counter
    before = weight._version
    receiver.receive({"w": weight})
    assert weight._version > before


def test_a_send_changes_nothing_for_autograd() -> None:
    given = some(2)
    sender, _ = record(given)
    sender.bind(given)
    before = [tensor._version for tensor in given.values()]
    sender.send()
    sender.send(given)
    assert [tensor._version for tensor in given.values()] == before


@pytest.mark.parametrize("name", [name for name in some(0) if name != "tied"])
def test_memory_freed_after_binding_is_an_error_until_it_is_back_and_bound(name: str) -> None:
    says = "(small|tied)" if name == "small" else name  # which are one
    given, into = some(2), some(0)
    sender, recorder = record(given)
    sender.bind(given)
    sender.send()
    receiver = ReplayReceiver(Player([*recorder.wire, *recorder.wire[3:]]), 0)
    receiver.bind(into)
    receiver.receive()
    for tensors, run, bind in ((given, sender.send, sender.bind), (into, receiver.receive, None)):
        storage = tensors[name].untyped_storage()
        nbytes = storage.nbytes()
        storage.resize_(0)
        with pytest.raises(UsageError, match=f"the memory of tensor {says} was freed"):
            run()
        with pytest.raises(UsageError, match=f"tensor {name} has lost its memory"):
            run(tensors)
        if bind is not None:
            storage.resize_(nbytes)
            tensors[name].fill_(5)
            bind(tensors)
            run()
