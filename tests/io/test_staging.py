"""Staging: what is lent, when it is lent again, and who is woken when it closes."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packcast.io.hands import join_all

from packcast.errors import PackcastError, TransferError
from packcast.io import hands
from packcast.io.pinned import Arena
from packcast.io.staging import (
    Buffers,
    PinnedStaging,
    SlotStaging,
    make_hands,
    make_staging,
    use_device,
)
from packcast.packed.counters import Counters
from packcast.packed.lanes import Mark
from packcast.packed.plan import BLOCK, PAGE, Chunk, Extent, slot_nbytes, trailer_nbytes
from packcast.packed.ring import Ring
from tests.helpers.processes import helpers_of, num_descriptors
from tests.helpers.waiting import Waiter

CPU = torch.device("cpu")
OVER = TransferError("it is over")


class SlowMark(Mark):
    """A copy that takes until `done`."""

    def __init__(self) -> None:
        super().__init__(None)
        self.done = threading.Event()

    def passed(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        assert self.done.wait(10)


def chunk(index: int) -> Chunk:
    return Chunk(index, 0, (Extent(0, 0, BLOCK),), BLOCK, trailer_nbytes(BLOCK))


def make_ring(num_buffers: int = 2) -> Ring:
    return Ring(CPU, slot_nbytes(BLOCK), num_buffers, Counters())


def staged(count: int) -> PinnedStaging:
    """`count` buffers of a page."""
    return PinnedStaging(Arena(count * PAGE, is_pinned=False), PAGE, PAGE)


class TestPinnedStaging:
    """Beside a GPU, but for the pinning."""

    def test_each_buffer_is_lent_once_and_again_when_it_is_given_back(self) -> None:
        staging = staged(2)
        one, two = (staging.lease(chunk(0), 0, 100) for _ in range(2))
        assert one.tensor.data_ptr() != two.tensor.data_ptr()
        third = Waiter(lambda: staging.lease(chunk(1), 0, 50).tensor.data_ptr())
        assert third.waits()
        two.release()
        assert third.result() == two.tensor.data_ptr()

    def test_a_lease_is_as_long_as_asked_for_and_its_view_the_same_memory(self) -> None:
        lease = staged(1).lease(chunk(0), 0, 7)
        lease.view[:] = b"seventy"
        assert bytes(lease.tensor.tolist()) == b"seventy"
        assert not lease.in_slot

    def test_the_copies_go_between_the_lease_and_its_place_in_the_slot(self) -> None:
        ring, staging = make_ring(), staged(1)
        slot = ring.take(chunk(0))
        slot.memory.zero_()
        lease = staging.lease(chunk(0), 40, 3)
        lease.view[:] = b"abc"
        lease.copy_to(slot, 40)
        assert bytes(slot.memory[39:44].tolist()) == b"\0abc\0"
        slot.memory[40] = ord("x")
        lease.copy_from(slot, 40)
        assert bytes(lease.view) == b"xbc"

    def test_a_buffer_is_lent_again_only_after_its_last_copy(self) -> None:
        staging, mark = staged(1), SlowMark()
        staging.lease(chunk(0), 0, 1).release(mark)
        again = Waiter(lambda: staging.lease(chunk(1), 0, 1))
        assert again.waits()
        mark.done.set()
        again.result()

    def test_waiting_for_a_copy_keeps_nobody_from_giving_back(self) -> None:
        staging, mark = staged(2), SlowMark()
        first, second = (staging.lease(chunk(0), 0, 1) for _ in range(2))
        first.release(mark)
        slow = Waiter(lambda: staging.lease(chunk(1), 0, 1))
        assert slow.waits()
        second.release()
        staging.lease(chunk(1), 1, 1)
        mark.done.set()
        slow.result()

    def test_close_wakes_everyone_who_waits_with_the_first_error(self) -> None:
        staging = staged(1)
        lease = staging.lease(chunk(0), 0, 1)
        waiters = [Waiter(lambda: staging.lease(chunk(1), 0, 1)) for _ in range(3)]
        assert all(waiter.waits() for waiter in waiters)
        staging.close(OVER)
        staging.close(PackcastError("something else"))
        for waiter in waiters:
            with pytest.raises(TransferError, match="it is over"):
                waiter.result()
        lease.release()
        with pytest.raises(TransferError, match="it is over"):
            staging.lease(chunk(1), 0, 1)

    def test_the_buffer_given_back_last_is_lent_first_as_it_is_still_in_the_cache(self) -> None:
        staging = staged(3)
        one, two, three = (staging.lease(chunk(0), 0, 1) for _ in range(3))
        for lease in (two, three, one):
            lease.release()
        again = [staging.lease(chunk(1), 0, 1) for _ in range(3)]
        assert [lease.tensor.data_ptr() for lease in again] == [
            lease.tensor.data_ptr() for lease in (one, three, two)
        ]

    def test_a_free_buffer_is_preferred_to_one_that_is_still_being_copied(self) -> None:
        staging, mark = staged(2), SlowMark()
        copied, free = (staging.lease(chunk(0), 0, 1) for _ in range(2))
        free.release()
        copied.release(mark)
        assert staging.lease(chunk(1), 0, 1).tensor.data_ptr() == free.tensor.data_ptr()
        waiting = Waiter(lambda: staging.lease(chunk(1), 0, 1).tensor.data_ptr())
        assert waiting.waits()
        mark.done.set()
        assert waiting.result() == copied.tensor.data_ptr()

    def test_buffers_lie_apart_and_fill_the_arena(self) -> None:
        staging = staged(4)
        leases = [staging.lease(chunk(0), 0, PAGE) for _ in range(4)]
        for i, lease in enumerate(leases):
            lease.tensor.fill_(i)
        assert sorted(staging.arena.view[::PAGE]) == [0, 1, 2, 3]
        assert [set(lease.view) for lease in leases] == [{i} for i in range(4)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_that_cannot_be_pinned_is_an_error_with_a_way_out() -> None:
    with pytest.raises(TransferError, match=r"cannot pin 2\.0 MiB") as caught:
        Arena(2 * BLOCK, is_pinned=True)
    assert "--staging" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (lambda: OSError(errno.EAGAIN, "try again"), TransferError),
        (lambda: RuntimeError("no"), RuntimeError),
    ],
)
def test_staging_is_given_back_where_not_every_helper_can_be_started(
    fault: Callable[[], Exception], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, start = staged(2), hands._start
    num_before = num_descriptors()

    def start_two(*args: Any) -> subprocess.Popen[bytes]:
        if len(helpers_of(os.getpid())) == 2:
            raise fault()
        return start(*args)

    monkeypatch.setattr(hands, "_start", start_two)
    with pytest.raises(kind):
        make_hands(Buffers(make_ring(), BLOCK, 0, b"tag", helpers=True), staging, 9, "test")
    assert staging.arena.fd == -1
    assert num_descriptors() == num_before - 1
    assert helpers_of(os.getpid()) == []


def test_on_a_cpu_the_slot_itself_is_lent_in_its_turn() -> None:
    ring = make_ring(2)
    staging = SlotStaging(ring, BLOCK)
    slot = ring.take(chunk(0))
    lease = staging.lease(chunk(0), 10, 5)
    lease.view[:] = b"bytes"
    assert bytes(slot.memory[10:15].tolist()) == b"bytes"
    assert lease.in_slot
    lease.copy_to(slot, 10)  # there is nothing to copy, nor anywhere else to copy to
    lease.copy_from(slot, 10)
    later = Waiter(lambda: staging.lease(chunk(2), 0, 1))
    ring.release(slot)
    assert later.waits()
    lease.release()
    later.result()


def test_closing_a_slots_staging_stops_its_ring() -> None:
    ring = make_ring(1)
    staging = SlotStaging(ring, BLOCK)
    waiters = [Waiter(lambda: staging.lease(chunk(1), 0, 1)), Waiter(lambda: ring.take(chunk(1)))]
    assert all(waiter.waits() for waiter in waiters)
    staging.close(OVER)
    for waiter in waiters:
        with pytest.raises(TransferError, match="it is over"):
            waiter.result()


def test_on_a_cpu_nothing_is_pinned() -> None:
    staging = make_staging(Buffers(make_ring(), BLOCK, 1 << 40, b"tag"))
    assert isinstance(staging, SlotStaging)
    assert staging.pinned_nbytes == 0


def test_a_cpu_needs_no_device_made_current() -> None:
    use_device(CPU)


def test_all_threads_that_are_stuck_share_one_deadline() -> None:
    stop = threading.Event()
    stuck = [threading.Thread(target=stop.wait, daemon=True) for _ in range(5)]
    quick = threading.Thread(target=lambda: None)
    for thread in (*stuck, quick):
        thread.start()
    began = time.monotonic()
    assert not join_all([*stuck, quick], 0.2)
    assert 0.15 < time.monotonic() - began < 0.6
    stop.set()
    assert join_all(stuck, 5.0)


def test_threads_behind_a_stuck_one_are_seen_to_have_ended() -> None:
    assert join_all([], 0.0)
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    assert join_all([ended], 0.0)
