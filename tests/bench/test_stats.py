"""Claims about the numbers that are made of runs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packcast.bench.model import RankRun, Run
from packcast.bench.stats import (
    advise,
    nearest_rank,
    ratio,
    slowest_rank,
    steady,
    summarize,
    waiting_on,
)

from .samples import run


def test_a_summary_is_computed_by_hand() -> None:
    found = summarize([4.0, 1.0, 3.0, 2.0])
    assert (found.median, found.min, found.max, found.p95) == (2.5, 1.0, 4.0, 4.0)
    assert found.cv == pytest.approx(math.sqrt(5 / 3) / 2.5)


def test_one_run_has_no_spread() -> None:
    assert summarize([3.0]).cv == 0.0


def test_p95_is_a_time_that_was_measured_within_which_95_of_100_were_done() -> None:
    times = [float(n) for n in range(1, 101)]
    assert nearest_rank(times[::-1], 0.95) == 95.0
    assert nearest_rank(times[:20], 0.95) == 19.0
    assert nearest_rank(times[:19], 0.95) == 19.0
    assert nearest_rank([7.0], 0.95) == 7.0


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_a_summary_is_in_order(times: list[float]) -> None:
    found = summarize(times)
    assert found.min <= found.median <= found.p95 <= found.max
    assert sum(time <= found.p95 for time in times) >= 0.95 * len(times)
    assert sum(time < found.p95 for time in times) < 0.95 * len(times)


def test_ratios_are_of_pairs_so_that_a_disturbance_of_both_falls_out() -> None:
    # A slow second half for both: the ratio of medians would be 3.
    assert ratio([2.0, 3.0, 30.0, 20.0], [1.0, 1.5, 15.0, 10.0]) == 2.0
    assert ratio([2.0, 4.0, 9.0], [1.0, 1.0]) == 3.0
    assert ratio([], [1.0]) is None


def test_the_warm_up_is_not_counted() -> None:
    runs = (run(9.0, warmup=True), run(1.0), run(2.0))
    assert [one.seconds for one in steady(runs)] == [1.0, 2.0]


def test_the_slowest_rank_is_so_by_its_median_not_by_one_bad_run() -> None:
    assert slowest_rank([run(1.0, 2.0), run(9.0, 2.0), run(1.0, 2.0)]) == 1
    assert slowest_rank([run(2.0, 2.0)]) == 0
    assert slowest_rank([]) is None


def waits(*ranks: dict[str, float]) -> Run:
    return Run(tuple(RankRun(rank=rank, seconds=10.0, waiting=w) for rank, w in enumerate(ranks)))


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        # A slow disk of the reader: the workers wait for the broadcast even a little longer.
        (({"read": 8.0, "broadcast": 0.1}, {"broadcast": 8.2}, {"broadcast": 8.3}), "read, rank 0"),
        # A slow disk of one worker: it never waits for the broadcast, all others do.
        (
            ({"broadcast": 7.9}, {"broadcast": 7.8, "write": 0.1}, {"write": 7.5}),
            "write, rank 2",
        ),
        (({"verify": 1.0}, {"verify": 3.0}), "verify, rank 1"),
        # A slow network: everybody waits for it.
        (({"read": 0.5, "broadcast": 7.0}, {"broadcast": 7.2, "write": 0.3}), "broadcast"),
        # Where the sender counts no waiting at all, the workers' word is taken.
        (({}, {"broadcast": 2.0}), "broadcast"),
        (({"h2d": 3.0, "read": 2.0}, {"d2h": 1.0}), "h2d, rank 0"),
    ],
)
def test_the_stage_that_holds_all_back_is_named_with_its_rank(
    ranks: tuple[dict[str, float], ...], name: str
) -> None:
    assert str(waiting_on([waits(*ranks), waits(*ranks)])) == name


def test_waiting_is_a_share_of_all_runs() -> None:
    found = waiting_on([waits({"read": 4.0}), waits({"read": 0.0})])
    assert found is not None
    assert found.share == pytest.approx(0.2)


def test_without_waiting_nothing_is_blamed() -> None:
    assert waiting_on([waits({}, {"read": 0.0})]) is None
    assert waiting_on([]) is None


def kinds(*runs: Run, wrong: int = 0, fraction: float | None = 0.9) -> list[str]:
    return [one.kind for one in advise(runs, wrong=wrong, fraction=fraction)]


def test_a_slow_first_run_is_told_but_not_where_it_was_a_warm_up() -> None:
    rest = (run(1.0), run(1.01), run(0.99))
    assert kinds(run(2.0), *rest) == ["first-run-slow"]
    assert kinds(run(2.0, warmup=True), *rest) == []
    assert kinds(run(1.1), *rest) == []
    (found,) = advise((run(2.0), *rest), wrong=0, fraction=None)
    assert "2.0 times" in found.text
    assert "--warmup" in found.advice


def test_a_wide_spread_is_told_where_there_are_runs_enough_to_tell() -> None:
    assert kinds(run(1.0), run(1.0), run(2.0)) == ["wide-spread"]
    assert kinds(run(1.0), run(2.0)) == []
    assert kinds(run(1.0), run(1.05), run(1.1)) == []


def test_wrong_bytes_and_a_limit_that_is_none_are_told() -> None:
    assert kinds(run(1.0), wrong=2) == ["wrong-bytes"]
    assert kinds(run(1.0), fraction=1.06) == ["above-limit"]
    assert kinds(run(1.0), fraction=1.05) == []
    assert kinds(run(1.0), fraction=None) == []
