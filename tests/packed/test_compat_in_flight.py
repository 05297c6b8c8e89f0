"""Whatever goes wrong on a GPU, and whenever, nothing is left in flight; next to the original."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests.packed.replays import Failing
from tests.packed.streams import (
    NBYTES,
    OWN_BUFFER,
    Consumer,
    Described,
    Pair,
    Producer,
    Receiving,
    Sending,
    flats,
    gpu,
    needs_gpu,
    ours_borrows,
    ours_receives,
    ours_sends,
    pause,
    theirs_receives,
    theirs_sends,
    wire_of,
)

pytestmark = [*needs_gpu, pytest.mark.usefixtures("warm")]


def sends_and_fails(send: Producer, place: str) -> bool:
    """True if something was in flight when the error was raised."""
    made, _ = flats(5, NBYTES)
    fail = Failing(ValueError("mine"))

    def pairs() -> Iterator[Pair]:
        for pair in made:
            if place == "iterator":
                fail()
            yield pair

    def post(pair: Pair) -> torch.Tensor:
        if place == "post_iter_func":
            fail()
        return pair[1]

    group = Sending()
    if place == "group":
        group.fail = fail
    with pytest.raises(ValueError, match="mine") as caught:
        send(pairs(), group, OWN_BUFFER, 3, post)
    is_busy = group.is_busy()
    assert caught.value is fail.error
    assert group.wire() == wire_of(made[:2])
    return is_busy


def receives_and_fails(receive: Consumer, place: str) -> bool:
    """The same for the other end."""
    made, all_described = flats(5, NBYTES)
    fail = Failing(ValueError("mine"))

    def described() -> Iterator[Described]:
        for entry in all_described:
            if place == "iterator":
                fail()
            yield entry

    def unpack(received: list[Pair]) -> None:
        if place == "post_unpack_func":
            fail()

    group = Receiving([tensor for _, tensor in made])
    if place == "group":
        group.fail = fail
    with pytest.raises(ValueError, match="mine") as caught:
        receive(described(), group, unpack, OWN_BUFFER, 3)
    is_busy = group.is_busy()
    assert caught.value is fail.error
    torch.cuda.synchronize()
    return is_busy


@pytest.mark.parametrize("place", ["iterator", "post_iter_func", "group"])
def test_an_exception_in_the_producer_leaves_nothing_in_flight(place: str) -> None:
    assert sends_and_fails(theirs_sends, place)
    assert not sends_and_fails(ours_sends, place)
    pairs, _ = flats(5, NBYTES)
    again = Sending(0)
    ours_sends(pairs, again, OWN_BUFFER)
    assert again.wire() == wire_of(pairs)


@pytest.mark.parametrize("place", ["iterator", "post_unpack_func", "group"])
@pytest.mark.parametrize("receive", [ours_receives, ours_borrows])
def test_an_exception_in_the_consumer_leaves_nothing_in_flight(
    place: str, receive: Consumer
) -> None:
    assert receives_and_fails(theirs_receives, place)
    assert not receives_and_fails(receive, place)
    pairs, described = flats(5, NBYTES)
    copies: list[torch.Tensor] = []
    again = Receiving([tensor for _, tensor in pairs], 0)
    receive(described, again, lambda got: copies.append(got[0][1].clone()), OWN_BUFFER)
    assert [bytes(copy.tolist()) for copy in copies] == wire_of(pairs)


@pytest.mark.parametrize("seed", range(8))
def test_delays_in_random_places_change_nothing(seed: int) -> None:
    dice = random.Random(seed)
    made = [
        (f"t{i}", torch.randint(0, 256, (dice.randint(0, 9000),), dtype=torch.uint8, device=gpu()))
        for i in range(40)
    ]
    limit, num_buffers = dice.randint(0, 20_000), dice.randint(1, 4)

    def dawdle() -> None:
        pause(dice.choice([0, 0, 0, 500_000, 3_000_000]))

    def pairs() -> Iterator[Pair]:
        for name, tensor in made:
            dawdle()
            yield name, tensor.clone()

    sending = Sending(0)
    sending.fail = dawdle  # on the stream of the broadcast
    ours_sends(pairs(), sending, limit, num_buffers)
    wire = sending.wire()
    assert b"".join(wire) == b"".join(bytes(tensor.tolist()) for _, tensor in made)

    sent = [torch.tensor(list(part), dtype=torch.uint8, device=gpu()) for part in wire]
    for receive in (ours_receives, ours_borrows):
        copies: list[torch.Tensor] = []

        def copy(received: list[Pair], into: list[torch.Tensor] = copies) -> None:
            dawdle()
            into.extend(tensor.clone() for _, tensor in received)

        receiving = Receiving(sent, 0)
        receiving.fail = dawdle
        described = [(name, (tensor.shape, tensor.dtype)) for name, tensor in made]
        receive(described, receiving, copy, limit, dice.randint(1, 4))
        assert all(torch.equal(got, tensor) for got, (_, tensor) in zip(copies, made, strict=True))
