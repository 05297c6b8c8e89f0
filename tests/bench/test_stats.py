"""What is made of runs: medians, ratios, limits, stars, and what is odd."""

from __future__ import annotations

import pytest

from packcast.bench.model import Row
from packcast.bench.stats import (
    best_rows,
    busy_of,
    default_lines,
    limits_of,
    ratio_of,
    reference_of,
    waiting_of,
    waiting_on,
    warnings_of,
    with_limits,
)
from packcast.packed.counters import StageTotal
from packcast.units import GIB, MIB
from tests.bench.samples import a_bench, case, row, run


def test_the_median_run_counts_and_the_warm_up_does_not() -> None:
    seconds = row(case(), [8.0, 4.0, 2.0], nbytes=8 * 10**9).seconds
    assert seconds is not None
    assert (seconds.median, seconds.min, seconds.max) == pytest.approx((2, 1, 4))
    assert seconds.cv == pytest.approx(0.6547, rel=1e-3)
    assert row(case(), [8.0, 4.0, 2.0]).rate == pytest.approx(4e9)
    assert row(case(), []).seconds is None
    assert row(case(), [1.0], failure="no room").seconds is None


def test_a_run_is_as_long_as_its_slowest_rank() -> None:
    assert run(1.0, 3.0, 2.0).seconds == 3.0


def test_ratios_are_taken_run_by_run_and_of_as_many_bytes() -> None:
    ours, theirs = row(case(), [8.0, 2.0, 6.0]), row(case("original"), [4.0, 1.0, 1.0])
    assert ratio_of(ours, theirs) == pytest.approx(2.0)
    assert ratio_of(theirs, theirs) == pytest.approx(1.0)
    larger = row(case(), [4.0], nbytes=16 * GIB)
    assert ratio_of(larger, theirs) == pytest.approx(1.0)
    assert ratio_of(ours, None) is None


def test_a_row_is_compared_with_the_original_of_its_table_and_a_chain_with_gloo() -> None:
    rows = [
        row(case(sink="land", source="resident"), [1.0]),
        row(case("original"), [1.0]),
        row(case("original", sink="land", source="resident", num_buffers=2), [1.0]),
        row(case("chain", sink="land", source="resident"), [1.0]),
        row(case("gloo broadcast", sink="land", source="resident", num_buffers=2), [1.0]),
        row(case("gloo broadcast", sink="land", source="resident"), [1.0]),
    ]
    assert reference_of(rows[0], rows) is rows[2]
    assert reference_of(rows[3], rows) is rows[5]
    assert reference_of(row(case(sink="verify"), [1.0]), rows) is None


def test_the_limit_of_a_row_is_what_its_stages_reach_at_once() -> None:
    rows = with_limits(
        [
            row(case(sink="write"), [4.0]),
            row(case(sink="write", readers=2), [4.0]),
            row(case("original", sink="write"), [2.0]),
            row(case(source="resident", sink="land"), [90.0]),
            row(case("load_file", sink="land"), [2.0]),
            row(case(limit="broadcast", buffer_size=MIB), [50.0]),
            row(case(limit="broadcast"), [99.0, 100.0]),
            row(case(limit="read"), [3.0]),
            row(case(limit="together", sink="write"), [5.0, 8.0, 6.0]),
            row(case(limit="together", sink="write", buffer_size=MIB), [7.0]),
            row(case(limit="together", sink="discard"), [1.0]),
            row(case(limit="together", sink="write", shape="moe"), [1.0]),
        ]
    )
    assert [one.limit and one.limit.stage for one in rows[:5]] == [
        "together",
        "broadcast",
        "together",
        "broadcast",
        None,
    ]
    assert rows[0].fraction == pytest.approx(0.5)
    assert rows[3].fraction == pytest.approx(0.9)
    best = {limit.label: limit.bytes_per_second / 1e9 for limit in limits_of(rows)}
    assert best == pytest.approx(
        {
            "read": 3.0,
            "broadcast, 1MiB per call": 50.0,
            "broadcast, 64MiB per call": 100.0,
            "together, dense, file to write": 8.0,
            "together, dense, file to discard": 1.0,
            "together, moe, file to write": 1.0,
        }
    )


def test_without_stages_at_once_the_slowest_stage_is_the_limit() -> None:
    found, *_ = with_limits(
        [row(case(), [4.0]), row(case(limit="read"), [8.0]), row(case(limit="broadcast"), [9.0])]
    )
    assert found.limit is not None
    assert (found.limit.stage, found.fraction) == ("read", pytest.approx(0.5))


def fastest(*rows: Row) -> list[int]:
    return [[id(one) for one in rows].index(id(one)) for one in best_rows(rows)]


def test_a_star_is_for_who_is_faster_than_the_noise() -> None:
    steady = row(case(), [10.0, 10.0, 10.0])
    near = row(case(num_buffers=2), [9.95, 9.95, 9.95])
    noisy = row(case(num_buffers=3), [7.0, 9.0, 11.0])
    slower = row(case(num_buffers=5), [8.0, 8.0, 8.0])
    assert fastest(slower, steady) == [1]
    assert fastest(slower, steady, near) == [1, 2]
    assert fastest(slower, steady, noisy) == [1, 2]
    wrong = row(case(num_buffers=6), [20.0] * 3, wrong=1)
    assert fastest(wrong, row(case("original"), [30.0]), steady) == [2]
    assert fastest(row(case(), [], failure="no room")) == []


def test_the_defaults_are_told_against_the_best_row() -> None:
    (line,) = default_lines(a_bench().rows)
    assert line == (
        "without options dense, file to discard, takes 64MiB x 4, one reader: 37.0 GB/s,"
        " 0.85 of the best row"
    )
    assert list(default_lines([row(case(is_default=True), [4.0])])) == []  # there was no choice


def test_a_wait_for_a_collective_counts_only_as_far_as_all_ranks_wait() -> None:
    late = row(case(), [1.0], waiting="read")
    assert waiting_on(late) == ("read, rank 1", pytest.approx(0.5))
    together = Row(case=case(), nbytes=1, runs=(run(1.0, 1.0, broadcast=0.4),))
    assert waiting_on(together) == ("broadcast", pytest.approx(0.001))
    assert waiting_on(Row(case=case(), nbytes=1, runs=(run(1.0),))) is not None
    assert waiting_on(Row(case=case(), nbytes=1)) is None


def test_a_rank_that_holds_the_others_up_is_blamed_under_its_own_stage() -> None:
    parts = run(1.0, 1.0, write=0.8, broadcast=0.1)
    waiting = {"broadcast": 0.85}  # rank 0 stands in the broadcast until rank 1 comes
    first = parts.ranks[0].__class__(rank=0, seconds=1.0, waiting=waiting)
    held = Row(case=case(), nbytes=1, runs=(parts.__class__((first, parts.ranks[1])),))
    assert waiting_on(held) == ("write, rank 1", 0.8)


def test_the_loops_time_is_the_senders_for_each_gib() -> None:
    assert row(case(), [4.0, 4.0]).loop_seconds_per_gib == pytest.approx(0.04 / 8)
    assert row(case(), []).loop_seconds_per_gib is None


def test_what_is_odd_is_said_once_for_all_rows_of_a_kind() -> None:
    rows = with_limits(
        [
            row(case(), [1.0, 9.0, 4.0]),
            row(case(num_buffers=2), [1.0, 9.0, 4.0]),
            row(case(num_buffers=3), [4.0], wrong=3),
            row(case(num_buffers=5), [], failure="no room"),
            row(case(num_buffers=6), [40.0]),
            row(case(limit="together"), [20.0]),
            row(case(limit="read"), [], failure="no file"),
        ]
    )
    said = list(warnings_of(rows))
    assert [text.partition(": ")[0] for text in said] == [
        "packcast dense file->discard 64MiB x 5",
        "limit of read, dense file->discard 64MiB x 4",
        "packcast dense file->discard 64MiB x 3",
        "packcast dense file->discard 64MiB x 4 (and 1 more rows)",
        "packcast dense file->discard 64MiB x 6",
    ]
    for text, words in zip(
        said,
        ("no room", "no file", "3 blocks or tensors", "spread", "200% of its limit"),
        strict=True,
    ):
        assert words in text
    assert rows[2].wrong == 3


def test_copies_that_are_faster_than_broadcasts_did_not_hold_up() -> None:
    totals = {
        "h2d": StageTotal(1, busy_s=1.0, waiting_s=2.0, first_begin=0.0, last_end=3.0),
        "broadcast": StageTotal(1, busy_s=3.0, waiting_s=0.5, first_begin=1.0, last_end=4.0),
    }
    assert waiting_of(totals) == {"broadcast": 2.5}  # type: ignore[arg-type]
    assert busy_of(totals, 8.0) == {"h2d": 2.0, "broadcast": 6.0}  # type: ignore[arg-type]
    assert busy_of({}, 8.0) == {}
