"""Totals, waiting and the trace: from any thread, nothing lost, nothing shared by accident."""

from __future__ import annotations

import math
import time
from contextlib import suppress

from packcast.packed.counters import Counters, StageEvent, StageTotal
from tests.helpers.waiting import Waiter


def test_totals_add_up_per_stage() -> None:
    counters = Counters()
    counters.add("read", 0, 10, 5.0, 6.0)
    counters.add("read", 1, 20, 4.0, 8.0)
    counters.add("write", 0, 7, 1.0, 1.5)
    assert counters.totals() == {
        "read": StageTotal(30, 5.0, 0.0, 4.0, 8.0),
        "write": StageTotal(7, 0.5, 0.0, 1.0, 1.5),
    }
    assert [counters.nbytes(stage) for stage in ("read", "write", "verify")] == [30, 7, 0]
    assert counters.trace() == [], "only on demand"


def test_totals_are_a_copy_of_one_moment() -> None:
    counters = Counters()
    counters.add("read", 0, 10, 0.0, 1.0)
    before = counters.totals()
    before["read"].nbytes = 99
    counters.add("read", 1, 10, 1.0, 2.0)
    assert counters.totals()["read"].nbytes == 20
    assert before["read"] == StageTotal(99, 1.0, 0.0, 0.0, 1.0)


def test_waiting_is_counted_beside_the_work_also_by_an_error_and_inside_another_wait() -> None:
    counters = Counters()
    counters.add("write", 0, 10, 1.0, 3.0)
    with suppress(TypeError), counters.waiting_on("write"), counters.waiting_on("read"):
        time.sleep(0.01)
        raise TypeError
    write, read = (counters.totals()[stage] for stage in ("write", "read"))
    assert read.waiting_s >= 0.01
    assert write.waiting_s >= 0.01
    assert (write.nbytes, write.busy_s) == (10, 2.0)
    assert (read.nbytes, read.first_begin, read.last_end) == (0, math.inf, 0.0)


def test_the_trace_is_kept_on_demand_in_the_order_in_which_work_ended() -> None:
    counters = Counters(trace=True)
    counters.add("write", 1, 5, 2.0, 3.0)
    counters.add("read", 0, 6, 1.0, 4.0)
    trace = counters.trace()
    assert trace == [StageEvent("write", 1, 5, 2.0, 3.0), StageEvent("read", 0, 6, 1.0, 4.0)]
    trace.clear()
    assert len(counters.trace()) == 2


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
