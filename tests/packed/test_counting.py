"""The library's calls count and time what they do only inside `counting`."""

from __future__ import annotations

import threading

import pytest
import torch

from packcast.packed import ring as ring_module
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from packcast.packed.counters import Counters, counting, wanted_counters
from packcast.packed.replay import ReplayReceiver, ReplaySender
from packcast.packed.ring import Broadcast
from tests.helpers.ranks import run_ranks
from tests.packed.replays import Bare

TENSORS = {f"w{i}": torch.randint(0, 256, (100 + i,), dtype=torch.uint8) for i in range(20)}
NBYTES = sum(tensor.numel() for tensor in TENSORS.values())


def moved(counters: Counters) -> dict[str, int]:
    return {stage: total.nbytes for stage, total in counters.totals().items() if total.nbytes}


def test_of_many_replays_only_the_one_that_was_asked_about_is_counted() -> None:
    def body(rank: int, broadcast: Broadcast) -> dict[str, int]:
        group, counters = Bare(broadcast), Counters()
        end: ReplaySender | ReplayReceiver
        if rank == 0:
            end = ReplaySender(TENSORS, group, 0, buffer_size=512, num_buffers=2)
        else:
            end = ReplayReceiver(group, 0)
        into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}

        def step() -> None:
            end.send(TENSORS) if isinstance(end, ReplaySender) else end.receive(into)

        step()
        with counting(counters):
            step()
        found = moved(counters)
        step()
        assert moved(counters) == found
        if rank:
            assert all(torch.equal(into[name], tensor) for name, tensor in TENSORS.items())
        return found

    sender, receiver = run_ranks(2, body)
    assert set(sender) == {"pack", "broadcast"}
    assert set(receiver) == {"broadcast", "unpack"}
    assert all(nbytes >= NBYTES for nbytes in [*sender.values(), *receiver.values()])


def test_the_two_functions_are_counted_where_they_are_asked_to_be() -> None:
    def body(rank: int, broadcast: Broadcast) -> dict[str, int]:
        group, counters = Bare(broadcast), Counters()

        def step() -> None:
            if rank == 0:
                packed_broadcast_producer(TENSORS.items(), group, 0, lambda pair: pair[1], 512, 2)
                return
            looks = [(name, (t.shape, t.dtype)) for name, t in TENSORS.items()]
            packed_broadcast_consumer(looks, group, 0, lambda pairs: None, 512, 2)

        with counting(counters):
            step()
        found = moved(counters)
        step()
        assert moved(counters) == found
        return found

    sender, receiver = run_ranks(2, body)
    assert sender == {"pack": NBYTES, "broadcast": NBYTES}
    assert receiver == {"broadcast": NBYTES, "unpack": NBYTES}


def test_streams_are_timed_only_while_they_are_counted() -> None:
    ring = ring_module.Ring(torch.device("cpu"), 512, 2)
    streams = (ring.fill, ring.comm, ring.drain)
    assert not any(stream.timed for stream in streams)
    ring.rewind(Counters())
    assert all(stream.timed for stream in streams)
    ring.rewind()
    assert not any(stream.timed for stream in streams)


def test_counting_is_for_one_thread_and_ends_also_by_an_error() -> None:
    seen: list[Counters | None] = []
    counters = Counters()
    with counting(counters):
        other = threading.Thread(target=lambda: seen.append(wanted_counters()))
        other.start()
        other.join()
        seen.append(wanted_counters())
    assert seen == [None, counters]

    def fail() -> None:
        with counting(counters):
            raise OSError("the network is down")

    with pytest.raises(OSError, match="down"):
        fail()
    assert wanted_counters() is None
