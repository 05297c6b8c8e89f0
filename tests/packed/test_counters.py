"""Totals, waiting and the trace: from any thread, nothing lost, nothing shared by accident."""

from __future__ import annotations

import math
import time

import pytest

from packcast.packed.counters import Counters, StageEvent, StageTotal
from tests.helpers.waiting import Waiter


def waste(seconds: float, then: type[Exception]) -> None:
    time.sleep(seconds)
    raise then


def test_totals_add_up_per_stage() -> None:
    counters = Counters()
    counters.add("read", 0, 10, 5.0, 6.0)
    counters.add("read", 1, 20, 4.0, 8.0)
    counters.add("write", 0, 7, 1.0, 1.5)
    assert counters.totals() == {
        "read": StageTotal(30, 5.0, 0.0, 4.0, 8.0),
        "write": StageTotal(7, 0.5, 0.0, 1.0, 1.5),
    }
    assert (counters.nbytes("read"), counters.nbytes("write")) == (30, 7)


def test_a_stage_that_did_nothing_has_no_total() -> None:
    assert Counters().nbytes("verify") == 0
    assert Counters().totals() == {}


def test_totals_are_a_copy_of_one_moment() -> None:
    counters = Counters()
    counters.add("read", 0, 10, 0.0, 1.0)
    before = counters.totals()
    before["read"].nbytes = 99
    counters.add("read", 1, 10, 1.0, 2.0)
    assert counters.totals()["read"].nbytes == 20
    assert before["read"] == StageTotal(99, 1.0, 0.0, 0.0, 1.0)


def test_waiting_is_counted_beside_the_work() -> None:
    counters = Counters()
    counters.add("write", 0, 10, 1.0, 3.0)
    for _ in range(2):
        with counters.waiting_on("write"):
            time.sleep(0.01)
    total = counters.totals()["write"]
    assert 0.02 <= total.waiting_s < 1
    assert (total.nbytes, total.busy_s) == (10, 2.0)


def test_waiting_for_what_never_came_is_counted_too() -> None:
    counters = Counters()
    with pytest.raises(TypeError), counters.waiting_on("read"):
        waste(0.01, then=TypeError)
    total = counters.totals()["read"]
    assert total.waiting_s >= 0.01
    assert (total.nbytes, total.first_begin, total.last_end) == (0, math.inf, 0.0)


def test_waits_inside_waits_count_for_their_own_stage() -> None:
    counters = Counters()
    with counters.waiting_on("write"), counters.waiting_on("read"):
        time.sleep(0.01)
    assert all(total.waiting_s >= 0.01 for total in counters.totals().values())


def test_the_trace_is_kept_on_demand_in_the_order_in_which_work_ended() -> None:
    counters = Counters(trace=True)
    counters.add("write", 1, 5, 2.0, 3.0)
    counters.add("read", 0, 6, 1.0, 4.0)
    trace = counters.trace()
    assert trace == [StageEvent("write", 1, 5, 2.0, 3.0), StageEvent("read", 0, 6, 1.0, 4.0)]
    trace.clear()
    assert len(counters.trace()) == 2


def test_without_demand_nothing_is_traced() -> None:
    counters = Counters()
    counters.add("read", 0, 5, 0.0, 1.0)
    assert counters.trace() == []


def test_nothing_is_lost_between_threads() -> None:
    counters = Counters(trace=True)

    def count() -> None:
        for i in range(500):
            counters.add("read", i, 3, 0.0, 1.0)
            with counters.waiting_on("write"):
                counters.totals()

    for waiter in [Waiter(count) for _ in range(8)]:
        waiter.result()
    assert counters.nbytes("read") == 8 * 500 * 3
    assert counters.totals()["read"].busy_s == 8 * 500
    assert len(counters.trace()) == 8 * 500
