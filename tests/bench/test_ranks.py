"""Whole benches as real processes over gloo: every way runs, is checked, and is named rightly."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packcast.io.pool import pool_kind
from packcast.units import GIB, MIB
from tests.bench.launch import EVERY_WAY, Bench, label, longest_waiting, rank_runs
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.commands import Commands, eventually, wait_all

EVERYTHING = {
    "sources": ["file", "resident"],
    "sinks": ["discard", "land", "write", "verify"],
    "baselines": True,
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Commands(tmp_path) as commands:
        yield Bench(commands, tmp_path)


def limits_bearing_on(rows: list[dict[str, Any]], *way: str) -> list[str]:
    row = next(row for row in rows if label(row) == way)
    assert all(limit["bytes_per_second"] > 0 and limit["detail"] for limit in row["limits"])
    return [limit["stage"] for limit in row["limits"]]


def test_every_way_is_measured_turn_about_and_found_right(bench: Bench) -> None:
    found = bench.run(**EVERYTHING, readers=[1, None], runs=1, warmup=1, limits=True)
    rows = found["measured"]
    assert {label(row) for row in rows} == EVERY_WAY
    assert found["num_cases"] == len(rows)
    for row in rows:
        assert row["failure"] is None
        assert [run["is_warmup"] for run in row["runs"]] == [True, False]
        parts = list(rank_runs(row))
        assert [part["rank"] for part in parts] == [0, 1, 0, 1]
        assert all(part["wrong"] == 0 and part["seconds"] > 0 for part in parts)
        assert row["nbytes"] >= 8 * MIB - 64 * 1024
    readers = {row["case"]["readers"] for row in rows if label(row)[0] == "packcast"}
    assert readers == {1, 2}
    # Every case of a series has its first turn before any has its second.
    written = [turn for _, source, sink, _, turn, _ in found["begun"] if sink == "write"]
    assert written == sorted(written)
    assert len(written) == 6

    # And each names the limits of the stages that its bytes pass.
    passed = ["read", "broadcast", "broadcast"]
    last = "together"
    assert limits_bearing_on(rows, "packcast", "file", "discard") == [*passed, last]
    assert limits_bearing_on(rows, "packcast", "file", "land") == [*passed, last]
    assert limits_bearing_on(rows, "packcast", "file", "write") == [*passed, "write", last]
    assert limits_bearing_on(rows, "packcast", "file", "verify") == [*passed, "read", last]
    assert limits_bearing_on(rows, "packcast", "resident", "land") == passed[1:]
    assert limits_bearing_on(rows, "load_file", "file", "land") == ["read"]
    assert len(found["limits"]) == len({json.dumps(limit) for limit in found["limits"]})
    assert found["environment"]["backend"] == "gloo"
    assert found["environment"]["versions"]["torch"]
    assert {rank["pool"] for rank in found["environment"]["ranks"]} == {pool_kind()}
    # The sender's loop is counted, from files.
    loops = {label(row): [part["loop_seconds"] for part in rank_runs(row)] for row in rows}
    assert all(seconds > 0 for seconds in loops["packcast", "file", "discard"])


LOADERS = ["packcast", "original", "load_file", "instanttensor", "fastsafetensors"]
LANDING: dict[str, Any] = {"sinks": ["land"], "baselines": True, "size": 4 * MIB}


def failures(found: dict[str, Any]) -> dict[str, str | None]:
    return {row["case"]["method"]: row["failure"] for row in found["measured"]}


def test_others_loaders_find_the_default_group_that_they_want(bench: Bench) -> None:
    found = bench.run(3, **LANDING, runs=2, warmup=1, fault={"kind": "stand ins"})
    assert failures(found) == dict.fromkeys(LOADERS)
    for row in found["measured"]:
        assert len(row["runs"]) == 3
        assert all(part["wrong"] == 0 and part["seconds"] > 0 for part in rank_runs(row))


def test_a_loader_that_fails_in_mid_load_on_one_rank_is_a_marked_row(bench: Bench) -> None:
    fault = {"kind": "stand ins", "with": {"fails_on": 1}}
    found = bench.run(3, **LANDING, fault=fault)
    reason = "rank 1: instanttensor: CUDA out of memory, as it were"
    assert failures(found) == dict.fromkeys(LOADERS) | {"instanttensor": reason}


def test_without_a_default_group_only_the_rows_that_want_one_fail(bench: Bench) -> None:
    fault = {"kind": "stand ins", "with": {"no_group_on": 1}}
    found = bench.run(**LANDING, fault=fault)
    reason = "torch's default group could not be made: this process has a default group already"
    marked = dict.fromkeys(LOADERS[-2:], f"rank 1: {reason}")
    assert failures(found) == dict.fromkeys(LOADERS) | marked


def test_a_damaged_byte_is_reported_as_wrong_in_every_sink(bench: Bench) -> None:
    damage = {"kind": "damage", "with": {"rank": 1}}
    found = bench.run(**EVERYTHING, fault=damage, code=6)
    ways = EVERY_WAY - {("load_file", "file", "land")}  # which broadcasts nothing
    for row in found["measured"]:
        assert row["failure"] is None
        wrong = {part["rank"]: part["wrong"] for part in rank_runs(row)}
        assert wrong[0] == 0
        assert (wrong[1] > 0) == (label(row) in ways), (label(row), wrong)
        if label(row) == ("packcast", "file", "discard"):
            # One byte in each of its chunks, which carry one block each, or a few short ones.
            assert 8 <= wrong[1] <= 10


@pytest.mark.parametrize(
    ("fault", "arguments", "stage", "ranks"),
    [
        ("slow reads", {"seconds": 0.04}, "read", {0}),
        ("slow broadcasts", {"seconds": 0.04}, "broadcast", {0, 1, 2}),
        ("slow sinks", {"rank": 2, "seconds": 0.08}, None, {2}),
    ],
)
def test_the_stage_that_is_slow_on_purpose_is_what_a_run_waited_for(
    bench: Bench, fault: str, arguments: dict[str, Any], stage: str | None, ranks: set[int]
) -> None:
    sinks = ["discard", "write", "verify"] if stage is None else ["discard"]
    found = bench.run(3, sinks=sinks, fault={"kind": fault, "with": arguments})
    assert len(found["measured"]) == len(sinks)
    for row in found["measured"]:
        named, rank = longest_waiting(row)
        assert named == (stage or row["case"]["sink"]), row
        assert rank in ranks


def test_rows_of_resident_weights_name_what_their_lanes_were_busy_with(bench: Bench) -> None:
    slow = {"kind": "slow broadcasts", "with": {"seconds": 0.02}}
    found = bench.run(sources=["resident"], sinks=["discard", "land"], baselines=True, fault=slow)
    waits = {label(row): [part["waiting"] for part in rank_runs(row)] for row in found["measured"]}
    for row in found["measured"]:
        if label(row)[0] in ("compat", "packcast"):
            assert longest_waiting(row)[0] == "broadcast"
            assert all(part["waiting"]["broadcast"] <= part["seconds"] for part in rank_runs(row))
    assert {"pack", "broadcast"} == set(waits["packcast", "resident", "land"][0])
    assert {"unpack", "broadcast"} == set(waits["packcast", "resident", "land"][1])
    assert waits["original", "resident", "land"] == [{}, {}]


def test_a_row_that_cannot_be_is_marked_and_the_sweep_goes_on(bench: Bench) -> None:
    found = bench.run(buffer_sizes=[16 * GIB], num_buffers=[1024], baselines=True)
    impossible, fine = found["measured"]
    assert label(impossible) == ("packcast", "file", "discard")
    assert "no room for 1024 buffers of 16GiB" in impossible["failure"]
    assert impossible["runs"] == []
    assert label(fine) == ("original", "file", "discard")
    assert fine["failure"] is None
    assert len(fine["runs"]) == 1


def test_ctrl_c_leaves_the_rows_so_far_and_no_files(bench: Bench) -> None:
    slow = {"kind": "slow broadcasts", "with": {"seconds": 0.02}}
    ranks = bench.start(sinks=["discard", "write"], runs=1000, fault=slow)
    eventually(lambda: turns_begun(bench) > 2, "the third turn")
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    # One may hear of the other's end before its own signal is delivered.
    assert sorted(end.returncode for end in wait_all(ranks)) in ([130, 130], [5, 130])
    rows = bench.found()["measured"]
    assert label(rows[0]) == ("packcast", "file", "discard")
    assert len(rows[0]["runs"]) >= 1
    bench.assert_nothing_left()


def turns_begun(bench: Bench) -> int:
    try:
        return max(turn for *_, turn, _ in bench.found()["begun"])
    except (FileNotFoundError, ValueError):
        return 0


def test_a_killed_rank_ends_the_bench_everywhere_by_name(bench: Bench) -> None:
    slow = {"kind": "slow broadcasts", "with": {"seconds": 0.02}}
    ranks = bench.start(3, sinks=["write"], runs=1000, fault=slow)
    eventually(lambda: turns_begun(bench) > 0, "the second turn")
    ranks[2].kill()
    for rank in ranks[:2]:
        ended = rank.wait()
        assert ended.returncode == 5
        assert "lost rank 2" in ended.stderr


def test_cold_files_cannot_lie_in_memory(bench: Bench, tmp_path: Path) -> None:
    ends = wait_all(bench.start(cold=True, directory="/dev/shm"))
    assert [end.returncode for end in ends] == [2, 2]
    assert "whose files are always in memory" in ends[0].stderr
    assert not bench.found_path.exists()


def test_a_given_checkpoint_may_hold_what_others_cannot_carry(bench: Bench, tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "a": ("F8_E4M3", (100,)),
        "scale": ("F32", ()),
        "empty": ("BF16", (0, 7)),
        "flags": ("BOOL", (13,)),
        "odd": ("F32", (5, 1, 3)),
        "large": ("F32", (MIB // 2,)),
    }
    write_safetensors(tmp_path / "given" / "model.safetensors", tensors)
    found = bench.run(**EVERYTHING, checkpoint=str(tmp_path / "given"), shapes=["dense"])
    for row in found["measured"]:
        assert row["case"]["shape"] == "given"
        if label(row)[0] == "original":
            assert row["failure"] == "the original cannot carry scale, which has no dimension"
        else:
            assert row["failure"] is None
            assert [part["wrong"] for part in rank_runs(row)] == [0, 0]
    assert (tmp_path / "given" / "model.safetensors").is_file()
