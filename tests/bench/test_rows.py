"""Claims about the rows that measurements become."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packcast.bench.model import Limit, Measured, RankRun, Run
from packcast.bench.results import Results, facts, warning_lines
from packcast.bench.rows import Row, binding_limit, make_rows
from packcast.units import GIB, MIB

from .samples import ENVIRONMENT, LIMITS, a_bench, case, measured, run


def only(one: Measured) -> Row:
    (row,) = make_rows([one])
    return row


def test_a_rate_is_of_the_median_and_the_warm_up_is_beside_it() -> None:
    row = only(measured(case(), [40.0, 50.0, 20.0]))
    assert row.seconds is not None
    assert row.bytes_per_second == pytest.approx(40e9)
    assert row.nbytes / row.seconds.min == pytest.approx(50e9)
    assert row.first_seconds == pytest.approx(2 * row.seconds.median)
    assert (row.slowest_rank, str(row.waiting_on)) == (1, "write, rank 1")
    assert (row.peak_device_nbytes, row.peak_pinned_nbytes) == (260 * MIB, 512 * MIB)


def test_the_senders_loop_has_a_cost_per_gib_of_cpu_time() -> None:
    one = measured(case(), [40.0, 50.0], nbytes=8 * GIB)
    assert only(one).loop_seconds_per_gib == pytest.approx(0.04 / 8)
    assert only(replace(one, sender=1)).loop_seconds_per_gib == pytest.approx(0.08 / 8)
    uncounted = RankRun(rank=0, seconds=1.0)
    assert only(replace(one, runs=(Run((uncounted,)),))).loop_seconds_per_gib is None


def test_the_lowest_limit_binds() -> None:
    limit = only(measured(case(), [22.0])).limit
    assert limit is not None
    assert (limit.stage, limit.bytes_per_second) == ("read", 44e9)
    assert limit.fraction == pytest.approx(0.5)
    slow = replace(LIMITS[4], bytes_per_second=11e9)
    limit = only(replace(measured(case(), [5.5]), limits=(*LIMITS[:4], slow))).limit
    assert limit is not None
    assert (limit.stage, limit.fraction) == ("d2h", pytest.approx(0.5))


def test_of_the_broadcasts_limits_the_one_of_large_calls_binds() -> None:
    resident = case(source="resident", sink="land", buffer_size=64 * MIB)
    limit = only(measured(resident, [182.5])).limit
    assert limit is not None
    assert (limit.stage, limit.bytes_per_second) == ("broadcast", 365e9)
    small = Limit(stage="broadcast", bytes_per_second=322e9, buffer_size=64 * MIB)
    other = Limit(stage="broadcast", bytes_per_second=1e9, buffer_size=MIB)
    assert binding_limit(resident, [other, small]) == small


def test_a_limit_of_other_readers_does_not_bear() -> None:
    one, two = (
        Limit(stage="read", bytes_per_second=rate, readers=readers)
        for rate, readers in ((40e9, 1), (70e9, 2))
    )
    assert binding_limit(case(readers=2), [one, two]) == two
    assert binding_limit(case(), [one, two]) == one
    assert binding_limit(case(), []) is None


def test_what_the_stages_reach_together_binds_and_not_the_lowest_of_them_alone() -> None:
    row = only(measured(case(sink="write"), [4.14]))
    assert row.limit is not None
    assert (row.limit.stage, row.limit.fraction) == ("together", pytest.approx(0.9))
    # Also where the lowest was measured in a bad moment: that is no limit of the row.
    slow, others = replace(LIMITS[0], bytes_per_second=1e9), LIMITS[1:]
    assert binding_limit(case(sink="write"), [slow, *others]) == LIMITS[-1]
    # Those of another sink, or of other readers, are of other rows.
    assert binding_limit(case(sink="verify"), LIMITS[-1:]) is None
    assert binding_limit(case(sink="write", readers=2), LIMITS[-1:]) is None


def test_ratios_are_to_the_originals_of_the_same_combination() -> None:
    rows = make_rows(
        [
            measured(case(), [20.0, 30.0, 44.0]),
            measured(case("load_file"), [4.0, 4.0, 4.0]),
            measured(case("original", buffer_size=GIB), [4.0, 10.0, 4.0]),
            measured(case(sink="write"), [4.0]),
            measured(case("original", sink="write"), [2.0]),
            measured(case(shape="tiny"), [4.0]),
        ]
    )
    # Of pairs: 5, 3 and 11; the ratio of medians would be 7.5.
    assert [row.ratio_to_original for row in rows] == [
        pytest.approx(5.0),
        pytest.approx(1.0),
        1.0,
        pytest.approx(2.0),
        1.0,
        None,
    ]


def test_the_best_is_the_fastest_of_ours_that_has_every_byte_right() -> None:
    rows = make_rows(a_bench())
    best = [
        (row.case.sink, row.case.buffer_size, row.case.num_buffers) for row in rows if row.is_best
    ]
    assert best == [("discard", 16 * MIB, 4), ("write", 16 * MIB, 4)]
    assert not any(row.is_best for row in make_rows([measured(case("original"), [99.0])]))


def test_a_case_that_could_not_run_is_a_row_with_its_reason() -> None:
    row = only(measured(case(), [], failure="no room"))
    assert (row.failure, row.seconds, row.bytes_per_second, row.is_best) == (
        "no room",
        None,
        None,
        False,
    )
    assert [one.kind for one in row.warnings] == ["impossible"]
    assert only(measured(case(), [])).failure == "was not run"


def test_a_wrong_byte_counts_even_in_the_warm_up() -> None:
    good = measured(case(), [4.0])
    warmup = run(1.0, 1.0, warmup=True, wrong=2)
    row = only(replace(good, runs=(warmup, *good.runs[1:])))
    assert row.wrong == 2
    assert not row.is_best


def test_rows_of_one_combination_stand_together_in_the_order_of_their_coming() -> None:
    rows = make_rows(
        [
            measured(case(buffer_size=4 * MIB), [1.0]),
            measured(case(sink="write"), [1.0]),
            measured(case("original"), [1.0]),
        ]
    )
    assert [(row.case.sink, row.case.method) for row in rows] == [
        ("discard", "packcast"),
        ("discard", "original"),
        ("write", "packcast"),
    ]


def test_a_kind_of_warning_is_told_once_but_each_impossibility_by_itself() -> None:
    noisy = [measured(case(buffer_size=n * MIB), [1.0, 2.0, 4.0]) for n in (1, 2, 3)]
    failures = [measured(case(num_buffers=n), [], failure=f"no room for {n}") for n in (8, 16)]
    lines = warning_lines(
        Results(command_line="", rows=make_rows([*noisy, *failures]), warnings=("of the whole",))
    )
    assert lines[0] == "of the whole"
    assert len(lines) == 4
    assert lines[1].startswith(
        "packcast dense file->discard 1MiB x 4 (and 2 more): the runs spread"
    )
    assert "no room for 8" in lines[2]
    assert "no room for 16" in lines[3]


def test_the_header_says_where_it_was_measured() -> None:
    lines = dict(facts(ENVIRONMENT))
    assert lines["group"] == "2 ranks, nccl"
    machine = "2 ranks on cuda:0, cuda:1 (2 x NVIDIA H100), 64 cores, native I/O threads"
    assert lines["host"] == f"node|1: {machine}"
    assert "torch 2.11.0" in lines["versions"]
    assert "tmpfs" in lines["files in"]
