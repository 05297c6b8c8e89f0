"""How much of the GPU's memory a transfer takes, and that it gives it back; next to the original.

By count of the caching allocator: allocated is what is in use, reserved what it has from CUDA.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.packed.streams import (
    MIB,
    Consumer,
    Pair,
    Producer,
    Receiving,
    Sending,
    flat,
    flats,
    gpu,
    needs_gpu,
    ours_borrows,
    ours_receives,
    ours_sends,
    theirs_receives,
    theirs_sends,
)

pytestmark = needs_gpu

NBYTES = 8 * MIB
OWN_BUFFER = NBYTES - 1  # a limit that gives each tensor of NBYTES a buffer of its own
SLACK = MIB


def sends(send: Producer, num_buffers: int = 2, cycles: int = 0) -> Callable[[], None]:
    """Sends resident weights, six buffers of them."""
    pairs, _ = flats(6, NBYTES)
    group = Sending(cycles, nbytes=NBYTES)
    return lambda: send(pairs, group, OWN_BUFFER, num_buffers)


def receives(receive: Consumer, num_buffers: int = 2, cycles: int = 0) -> Callable[[], None]:
    """Receives them, and drops them."""
    pairs, described = flats(6, NBYTES)
    group = Receiving([tensor for _, tensor in pairs], cycles)
    return lambda: receive(described, group, lambda received: None, OWN_BUFFER, num_buffers)


def growth(run: Callable[[], None], calls: int = 50) -> int:
    """By how much reserved memory grows over so many calls, after two that warm up."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    grown: int = torch.cuda.memory_reserved() - before
    return grown


def peak(run: Callable[[], None]) -> int:
    """How much more memory is in use at the height of it than before, counting also what was
    dropped while a stream still needed it.
    """
    run()  # what libraries allocate once
    gc.collect()  # memory in cycles of earlier tests would be freed meanwhile
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.empty(1, device=gpu())  # the allocator looks after what was dropped when it is asked
    torch.cuda.reset_peak_memory_stats()
    before, in_use = (
        torch.cuda.memory_stats()["active_bytes.all.current"],
        torch.cuda.memory_allocated(),
    )
    run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == in_use, "something is left"
    height: int = torch.cuda.memory_stats()["active_bytes.all.peak"]
    return height - before


def test_the_producers_reserved_memory_is_flat_over_50_calls() -> None:
    assert growth(sends(theirs_sends)) > 0
    assert growth(sends(ours_sends)) == 0


@pytest.mark.parametrize("receive", [ours_receives, ours_borrows])
def test_the_consumers_reserved_memory_is_flat_over_50_calls(receive: Consumer) -> None:
    assert growth(receives(theirs_receives)) > 0
    assert growth(receives(receive)) == 0


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_the_producer_uses_its_buffers_and_no_more(num_buffers: int) -> None:
    bound = num_buffers * NBYTES + SLACK
    # A new buffer is there before the one that it takes the place of is gone.
    assert peak(sends(theirs_sends, num_buffers)) > bound
    assert peak(sends(ours_sends, num_buffers)) <= bound


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_the_consumer_uses_its_buffers_and_what_the_callback_is_given(num_buffers: int) -> None:
    bound = num_buffers * NBYTES + SLACK
    assert peak(receives(ours_borrows, num_buffers)) <= bound
    assert peak(receives(ours_receives, num_buffers)) <= bound + NBYTES


def test_a_borrowed_single_buffer_is_all_there_is() -> None:
    assert peak(receives(theirs_receives, 1)) > NBYTES + SLACK
    assert peak(receives(ours_borrows, 1)) <= NBYTES + SLACK


def test_tensors_made_on_the_way_are_not_made_far_ahead_of_a_slow_group() -> None:
    """A producer that outruns the network must not end with the whole model in memory."""
    count = 20

    def pairs() -> Iterator[Pair]:
        for value in range(count):
            yield f"t{value}", flat(value, NBYTES)

    group = Sending(20_000_000, nbytes=NBYTES)
    # Two slots, what is being packed, what was, and the tensor that is being made.
    assert peak(lambda: ours_sends(pairs(), group, OWN_BUFFER)) <= 5 * NBYTES + SLACK
