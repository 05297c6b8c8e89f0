"""Which stage is named: the ranks' counters read together."""

from __future__ import annotations

from packcast.bench.bottleneck import busy_of, lanes_of, settle_waiting, waiting_of
from packcast.bench.model import RankRun
from packcast.packed.counters import Stage, StageTotal


def total(*, busy_s: float = 0.0, waiting_s: float = 0.0) -> StageTotal:
    return StageTotal(1, busy_s, waiting_s, 1.0, 3.0)


def ranks(*waiting: dict[str, float]) -> list[RankRun]:
    return [RankRun(rank=i, seconds=2.0, waiting=w) for i, w in enumerate(waiting)]


def named(settled: tuple[RankRun, ...]) -> tuple[str, int]:
    waits = [(s, stage, part.rank) for part in settled for stage, s in part.waiting.items()]
    return max(waits)[1:]


def test_those_who_wait_for_a_slow_reader_do_not_name_the_broadcast() -> None:
    settled = settle_waiting(
        ranks({"read": 0.9, "broadcast": 0.1}, {"discard": 0.01, "broadcast": 1.0})
    )
    assert named(settled) == ("read", 0)


def test_those_who_wait_for_a_slow_sink_do_not_name_the_broadcast() -> None:
    settled = settle_waiting(
        ranks(
            {"read": 0.01, "broadcast": 1.0},
            {"write": 0.02, "broadcast": 0.98},
            {"write": 0.8, "broadcast": 0.2},
        )
    )
    assert named(settled) == ("write", 2)


def test_a_broadcast_that_all_wait_for_is_named() -> None:
    settled = settle_waiting(
        ranks({"read": 0.1, "broadcast": 0.9}, {"discard": 0.05, "broadcast": 0.95})
    )
    assert named(settled)[0] == "broadcast"


def test_a_rank_that_never_waited_for_the_broadcast_was_the_late_one() -> None:
    settled = settle_waiting(ranks({"h2d": 1.0}, {"broadcast": 1.0}))
    assert named(settled) == ("h2d", 0)


def test_nothing_recorded_stays_nothing() -> None:
    assert settle_waiting(ranks({}, {})) == tuple(ranks({}, {}))


def test_full_staging_is_the_copys_fault_only_if_the_copy_was_slower_than_the_broadcast() -> None:
    def waits(h2d_busy_s: float) -> dict[str, float]:
        totals: dict[Stage, StageTotal] = {
            "read": total(waiting_s=0.1),
            "h2d": total(busy_s=h2d_busy_s, waiting_s=1.0),
            "broadcast": total(busy_s=0.5, waiting_s=0.2),
        }
        return waiting_of(totals)

    assert waits(0.9) == {"read": 0.1, "h2d": 1.0, "broadcast": 0.2}
    assert waits(0.1) == {"read": 0.1, "broadcast": 1.2}


def test_busy_is_from_first_beginning_to_last_end_of_stages_that_moved_bytes() -> None:
    idle = StageTotal(waiting_s=1.0)
    assert busy_of({"read": total(), "write": idle}) == {"read": 2.0}


def span(begin: float, end: float, busy_s: float) -> StageTotal:
    return StageTotal(1, busy_s, 0.0, begin, end)


def test_of_lanes_the_one_that_is_busy_longest_is_named_by_its_share_of_the_run() -> None:
    sender = lanes_of({"pack": span(5.0, 8.5, 3.2), "broadcast": span(5.5, 9.0, 1.0)}, 2.0)
    assert sender == {"pack": 1.6, "broadcast": 0.5}
    # In a receiver's broadcasts is also its waiting for those that are not packed yet.
    receiver = lanes_of({"broadcast": span(5.0, 9.0, 3.8), "unpack": span(5.5, 9.0, 0.4)}, 2.0)
    settled = settle_waiting(ranks(sender, receiver))
    assert named(settled) == ("pack", 0)


def test_lanes_that_did_nothing_wait_for_nothing() -> None:
    assert lanes_of({}, 2.0) == {}
    assert lanes_of({"broadcast": StageTotal(waiting_s=1.0)}, 2.0) == {}
