"""Slots on a CPU: which chunk has which, and when it is free."""

from __future__ import annotations

import threading

import pytest
import torch

from packcast.errors import TransferError
from packcast.packed.counters import Counters
from packcast.packed.pipeline import run_pipeline
from packcast.packed.plan import (
    BLOCK,
    PAGE,
    Chunk,
    Extent,
    ring_nbytes,
    slot_nbytes,
    trailer_nbytes,
)
from packcast.packed.ring import MAX_VIEWS, Broadcast, Ring, Slot
from tests.helpers.ranks import run_ranks
from tests.helpers.waiting import Waiter


def chunk(index: int, nbytes: int = BLOCK, root: int = 0) -> Chunk:
    return Chunk(index, root, (Extent(0, 0, nbytes),), nbytes, trailer_nbytes(BLOCK))


def make_ring(num_buffers: int = 2, counters: Counters | None = None) -> Ring:
    return Ring(torch.device("cpu"), slot_nbytes(BLOCK), num_buffers, counters or Counters())


def test_chunk_i_has_slot_i_modulo_their_number_and_slots_do_not_overlap() -> None:
    ring = make_ring(3)
    slots = [ring.take(chunk(i)) for i in range(3)]
    assert [ring.take(chunk(i)) for i in range(3, 6)] == slots
    assert sum(slot.memory.numel() for slot in slots) == ring_nbytes(BLOCK, 3)
    for i, slot in enumerate(slots):
        assert slot.memory.numel() == slot_nbytes(BLOCK)
        slot.memory.fill_(i)
    assert all(bool((slot.memory == i).all()) for i, slot in enumerate(slots))


class HostEvent:
    """Passed when the test says so."""

    cuda_event = None
    passed_at = 0.0

    def __init__(self) -> None:
        self.is_passed = threading.Event()

    def passed(self) -> bool:
        return self.is_passed.is_set()

    def synchronize(self) -> None:
        assert self.is_passed.wait(20)


@pytest.mark.parametrize("name", ["filled", "arrived", "drained"])
def test_a_chunk_waits_until_everyone_has_done_with_its_slot(name: str) -> None:
    ring, event = make_ring(2), HostEvent()
    slot = ring.take(chunk(0))
    setattr(slot, name, event)
    assert not ring.is_free(chunk(2))
    assert ring.is_free(chunk(1))
    later = Waiter(lambda: ring.take(chunk(2)))
    assert later.waits()
    event.is_passed.set()
    assert later.result() is slot
    assert ring.is_free(chunk(2))


def test_taking_a_slot_raises_why_its_last_use_failed() -> None:
    class Broken(HostEvent):
        def synchronize(self) -> None:
            raise TransferError("it is over")

    ring = make_ring(1)
    ring.take(chunk(0)).drained = Broken()
    with pytest.raises(TransferError, match="it is over"):
        ring.take(chunk(1))


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, BLOCK])
def test_the_trailer_lies_on_the_next_page_and_travels_with_the_payload(nbytes: int) -> None:
    ring = make_ring()
    one = chunk(0, nbytes, root=5)
    slot = ring.take(one)
    offset = one.trailer_offset
    assert offset % PAGE == 0
    assert nbytes <= offset < nbytes + PAGE
    sent: list[tuple[int, int, int]] = []
    ring.broadcast(one, slot, lambda t, root: sent.append((t.data_ptr(), t.numel(), root)))
    assert sent == [(slot.memory.data_ptr(), offset + trailer_nbytes(BLOCK), 5)]
    assert sent[0][1] <= slot.memory.numel()


def test_a_slot_that_the_next_rank_has_not_yet_is_waited_for_as_a_broadcast() -> None:
    class Slow(HostEvent):
        def synchronize(self) -> None:
            if not self.is_passed.wait(0.05):
                self.is_passed.set()

    counters = Counters()
    run_pipeline(
        [chunk(i) for i in range(3)],
        rank=1,
        ring=make_ring(1, counters),
        broadcast=lambda _memory, _root: Slow(),
        source=None,
        drain=None,
    )
    totals = counters.totals()
    assert totals["broadcast"].waiting_s > 0.1
    assert list(totals) == ["broadcast"]


def test_a_slot_grows_to_a_chunk_that_turns_out_larger_and_stays_so() -> None:
    ring = make_ring(2)
    other = ring.take(chunk(1)).memory
    slot = ring.take(chunk(0))
    assert ring.take(chunk(2, 3 * BLOCK)) is slot
    assert slot.memory.numel() == chunk(2, 3 * BLOCK).wire_nbytes
    grown = slot.memory.data_ptr()
    assert ring.take(chunk(4)).memory.data_ptr() == grown
    assert ring.take(chunk(1)).memory is other


def test_a_slot_does_not_grow_while_somebody_uses_it() -> None:
    ring, event = make_ring(1), HostEvent()
    slot = ring.take(chunk(0))
    before, slot.drained = slot.memory, event
    larger = Waiter(lambda: ring.take(chunk(1, 2 * BLOCK)))
    assert larger.waits()
    assert slot.memory is before
    event.is_passed.set()
    larger.result()
    assert slot.memory.numel() > 2 * BLOCK


def test_a_broadcast_is_counted_by_payload_and_marks_the_slot() -> None:
    counters = Counters(trace=True)
    ring = make_ring(counters=counters)
    slot = ring.take(chunk(0, 7))
    assert slot.arrived is None
    ring.broadcast(chunk(0, 7), slot, lambda tensor, root: None)
    (event,) = counters.trace()
    assert (event.stage, event.chunk, event.nbytes) == ("broadcast", 0, 7)
    assert slot.arrived is not None
    assert event.end == slot.arrived.passed_at


def test_a_broadcast_that_fails_counts_no_byte_but_its_waiting() -> None:
    counters = Counters()
    ring = make_ring(counters=counters)

    def broken(tensor: torch.Tensor, root: int) -> None:
        raise RuntimeError("connection reset")

    with pytest.raises(RuntimeError, match="connection reset"):
        ring.broadcast(chunk(0), ring.take(chunk(0)), broken)
    assert counters.nbytes("broadcast") == 0
    assert counters.totals()["broadcast"].waiting_s > 0


def test_ranks_that_failed_at_different_chunks_end_all_broadcasts_together() -> None:
    chunks = [chunk(i, root=i % 2) for i in range(7)]

    def fail_at(rank: int, broadcast: Broadcast) -> tuple[bool, int]:
        ring = make_ring(2)
        for each in chunks[: (2, 5, 7)[rank]]:
            slot = ring.take(each)
            ring.broadcast(each, slot, broadcast)
        return ring.run_dry(chunks, 3, broadcast, 10.0), ring.num_broadcast

    assert run_ranks(3, fail_at) == [(True, 2), (True, 5), (True, 7)]


def test_a_slots_view_made_in_inference_mode_can_be_written_outside_it() -> None:
    slot = Slot(torch.zeros(16, dtype=torch.uint8))
    with torch.inference_mode():
        slot.view(4, 8)
    slot.view(4, 8).fill_(1)
    assert slot.memory.tolist() == [0] * 4 + [1] * 8 + [0] * 4


def test_a_slot_keeps_no_view_of_the_memory_that_it_had() -> None:
    slot = Slot(torch.zeros(16, dtype=torch.uint8))
    slot.view(0, 8)
    slot.replace(torch.ones(32, dtype=torch.uint8))
    assert slot.view(0, 8).tolist() == [1] * 8


def test_a_slot_keeps_few_views_of_chunks_that_all_have_other_sizes() -> None:
    slot = Slot(torch.zeros(1024, dtype=torch.uint8))
    for nbytes in range(1000):
        assert slot.view(0, nbytes).numel() == nbytes
    assert len(slot._views) <= MAX_VIEWS
