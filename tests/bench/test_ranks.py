"""Whole benches as real processes over gloo: every method runs, is checked and named rightly."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packcast.io.pool import pool_kind
from packcast.units import GIB, MIB
from tests.bench.launch import EVERY_WAY, OVER_GLOO, Bench, label, rank_runs, rows_of
from tests.helpers.checkpoints import write_safetensors
from tests.helpers.commands import Commands, eventually, wait_all

EVERYTHING = {
    "sources": ["file", "resident"],
    "sinks": ["discard", "land", "write", "verify"],
    "baselines": True,
}
ENDLESS: dict[str, Any] = {
    "runs": 1000,
    "fault": {"kind": "slow broadcasts", "with": {"seconds": 0.02}},
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Commands(tmp_path) as commands:
        yield Bench(commands, tmp_path)


def test_every_method_is_measured_in_turn_and_found_right(bench: Bench) -> None:
    found = bench.run(**EVERYTHING, readers=[1, None], runs=1, warmup=1)
    rows = rows_of(found)
    assert {label(row) for row in rows} == EVERY_WAY | OVER_GLOO
    assert found["num_cases"] == len(found["rows"])
    for row in found["rows"]:
        assert row["failure"] is None
        assert [run["is_warmup"] for run in row["runs"]] == [True, False]
        parts = list(rank_runs(row))
        assert [part["rank"] for part in parts] == [0, 1, 0, 1]
        assert all(part["wrong"] == 0 and part["seconds"] > 0 for part in parts)
        assert row["nbytes"] >= 8 * MIB - 64 * 1024
    readers = {row["readers"] for row in rows if label(row)[0] == "packcast"}
    assert readers == {1, 2}
    # Every case of a table has its first run before any has its second.
    turns = [text.rpartition("run ")[2] for text in found["doing"] if "file->write" in text]
    assert turns == sorted(turns)

    assert found["environment"]["backend"] == "gloo"
    assert found["environment"]["versions"]["torch"]
    assert {rank["pool"] for rank in found["environment"]["ranks"]} == {pool_kind()}
    discard = next(row for row in rows if label(row) == ("packcast", "file", "discard"))
    assert discard["loop_seconds_per_gib"] > 0
    assert discard["peak_pinned_nbytes"] == 0


def test_each_row_has_the_limit_of_its_stages_together_or_of_the_only_one(bench: Bench) -> None:
    sources, sinks = ["file", "resident"], ["discard", "write"]
    found = bench.run(sources=sources, sinks=sinks, readers=[1, None], limits=True)
    assert all(row["failure"] is None for row in found["rows"])
    for row in rows_of(found):
        assert row["limit_stage"] == ("together" if row["source"] == "file" else "broadcast"), row
    kinds = {(limit["stage"], limit["sink"], limit["readers"]) for limit in found["limits"]}
    together = {("together", sink, n) for sink in sinks for n in (1, 2)}
    single = {("read", None, 1), ("read", None, 2), ("broadcast", None, None)}
    assert kinds == together | single | {("write", None, None)}
    assert all(limit["bytes_per_second"] > 0 for limit in found["limits"])


def test_along_a_chain_no_rank_sends_the_weights_more_than_once(bench: Bench) -> None:
    found = bench.run(4, sources=["file", "resident"], sinks=["land"], baselines=True)
    for row in rows_of(found):
        if row["method"] == "chain":
            assert row["ratio_to"] == "gloo broadcast"
            assert [part["sent_nbytes"] for part in rank_runs(row)] == [row["nbytes"]] * 3 + [0]
        if label(row) == ("packcast", "file", "land"):
            assert 1 <= row["most_sent_of_nbytes"] < 1.01  # trailers
        assert sum(part["wrong"] for part in rank_runs(row)) == 0


def test_a_damaged_byte_is_reported_as_wrong_in_every_sink(bench: Bench) -> None:
    found = bench.run(**EVERYTHING, fault={"kind": "damage", "with": {"rank": 1}}, code=6)
    for row in rows_of(found):
        assert row["failure"] is None
        wrong = {part["rank"]: part["wrong"] for part in rank_runs(row)}
        assert wrong[0] == 0
        assert (wrong[1] > 0) == (row["method"] != "load_file"), (label(row), wrong)
        if label(row) == ("packcast", "file", "discard"):
            # One byte in each of its chunks, which carry one block each, or a few short ones.
            assert 8 <= wrong[1] <= 10


def test_an_unchecked_row_is_neither_right_nor_wrong(bench: Bench) -> None:
    fault = {"kind": "damage", "with": {"rank": 1}}
    found = bench.run(**EVERYTHING, check=False, fault=fault)
    assert {label(row) for row in rows_of(found)} == EVERY_WAY | OVER_GLOO
    for row in found["rows"]:
        assert row["failure"] is None
        assert [part["wrong"] for part in rank_runs(row)] == [None, None]
        assert row["wrong"] is None


@pytest.mark.parametrize(
    ("fault", "arguments", "sinks", "waited"),
    [
        ("slow reads", {"seconds": 0.04}, ["discard"], "read, rank 0"),
        ("slow broadcasts", {"seconds": 0.04}, ["discard"], "broadcast"),
        (
            "slow sinks",
            {"rank": 2, "seconds": 0.08},
            ["discard", "write", "verify"],
            "{sink}, rank 2",
        ),
    ],
)
def test_the_stage_that_is_slow_on_purpose_is_what_a_run_waited_for(
    bench: Bench, fault: str, arguments: dict[str, Any], sinks: list[str], waited: str
) -> None:
    found = bench.run(3, sinks=sinks, fault={"kind": fault, "with": arguments})
    assert len(found["rows"]) == len(sinks)
    for row in found["rows"]:
        assert row["waiting_on"] == waited.format(sink=row["sink"]), row


def test_rows_of_resident_weights_name_what_their_streams_were_busy_with(bench: Bench) -> None:
    slow = {"kind": "slow broadcasts", "with": {"seconds": 0.02}}
    found = bench.run(sources=["resident"], sinks=["discard", "land"], fault=slow)
    waits = {label(row): [part["waiting"] for part in rank_runs(row)] for row in found["rows"]}
    for row in found["rows"]:
        assert row["waiting_on"] == "broadcast"
        assert all(part["waiting"]["broadcast"] <= part["seconds"] for part in rank_runs(row))
    assert {"pack", "broadcast"} == set(waits["packcast", "resident", "land"][0])
    assert {"unpack", "broadcast"} == set(waits["packcast", "resident", "land"][1])


def test_a_row_that_cannot_be_is_marked_and_the_sweep_goes_on(bench: Bench) -> None:
    # More than any machine's address space lets one process have.
    found = bench.run(buffer_sizes=[16 * GIB], num_buffers=[1024], baselines=True)
    impossible, fine = found["rows"]
    assert label(impossible) == ("packcast", "file", "discard")
    assert "no memory for 1024 buffers of 16GiB" in impossible["failure"]
    assert impossible["runs"] == []
    assert label(fine) == ("original", "file", "discard")
    assert fine["failure"] is None
    assert len(fine["runs"]) == 1


@pytest.mark.parametrize(
    ("fault", "method", "sink", "said"),
    [
        ("full disk", "packcast", "write", "rank 1: "),
        ("no memory", "packcast", "discard", "rank 1: cpu is not available, or has no memory"),
    ],
)
def test_what_fails_on_one_rank_is_the_same_marked_row_on_all(
    bench: Bench, fault: str, method: str, sink: str, said: str
) -> None:
    told = {"kind": fault, "with": {"rank": 1}}
    found = bench.run(3, sinks=[sink], baselines=True, runs=2, fault=told)
    failures = {row["method"]: row["failure"] for row in found["rows"]}
    assert failures.pop(method).startswith(said), found["rows"]
    assert failures == {"original": None}


def test_a_limit_that_cannot_be_measured_takes_no_row_along(bench: Bench) -> None:
    found = bench.run(
        sinks=["discard", "write"], limits=True, fault={"kind": "full disk", "with": {"rank": 1}}
    )
    kinds = {(limit["stage"], limit["sink"]) for limit in found["limits"]}
    assert kinds == {("read", None), ("broadcast", None), ("together", "discard")}
    assert any("limit of write" in text for text in found["warnings"])


def test_weights_without_room_end_the_bench_with_one_sentence(bench: Bench) -> None:
    ends = wait_all(bench.start(3, size=1 << 42))
    assert [end.returncode for end in ends] == [7, 7, 7]
    assert len({end.stderr for end in ends}) == 1
    assert "needed" in ends[0].stderr
    bench.assert_nothing_left()


def test_ranks_that_were_asked_for_different_things_do_not_begin(bench: Bench) -> None:
    ends = wait_all(bench.start(fault={"kind": "other settings", "with": {"rank": 1}}))
    assert [end.returncode for end in ends] == [4, 4]
    assert "was started with other options than the sender" in ends[1].stderr


def test_ctrl_c_leaves_the_rows_so_far_and_no_files(bench: Bench) -> None:
    ranks = bench.start(sinks=["discard", "write"], **ENDLESS)
    eventually(lambda: bench.num_turns() > 2, "the third turn")
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    # One may hear of the other's end before its own signal is delivered.
    assert sorted(end.returncode for end in wait_all(ranks)) in ([130, 130], [5, 130])
    rows = bench.found()["rows"]
    assert label(rows[0]) == ("packcast", "file", "discard")
    assert len(rows[0]["runs"]) >= 1
    bench.assert_nothing_left()


@pytest.mark.chaos
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_rank_ends_the_bench_everywhere_by_name(
    bench: Bench, how: signal.Signals
) -> None:
    ranks = bench.start(3, sinks=["write"], **ENDLESS)
    eventually(lambda: bench.num_turns() > 1, "the second turn")
    ranks[2].send_signal(how)
    for rank in ranks[:2]:
        ended = rank.wait()
        assert ended.returncode == 5
        assert "lost rank 2" in ended.stderr


def test_a_source_that_shrinks_in_mid_run_ends_the_bench_everywhere(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "given.safetensors"
    write_safetensors(path, {"large": ("F32", (8 * MIB // 4,))})
    ranks = bench.start(3, checkpoint=str(path), shapes=[], **ENDLESS)
    eventually(lambda: bench.num_turns() > 1, "the second turn")
    with path.open("r+b") as file:
        file.truncate(2 * MIB)
    ends = wait_all(ranks)
    assert {end.returncode for end in ends} == {3}
    assert all("given.safetensors" in end.stderr for end in ends)


def test_cold_files_cannot_lie_in_memory(bench: Bench) -> None:
    ends = wait_all(bench.start(cold=True, directory="/dev/shm"))
    assert [end.returncode for end in ends] == [2, 2]
    assert "whose files are always in memory" in ends[0].stderr


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
    found = bench.run(**EVERYTHING, checkpoint=str(tmp_path / "given"), shapes=[])
    for row in rows_of(found):
        assert row["shape"] == "given"
        if row["method"] == "original":
            assert row["failure"] == "the original cannot carry scale, which has no dimension"
        else:
            assert row["failure"] is None
            assert [part["wrong"] for part in rank_runs(row)] == [0, 0]
    assert (tmp_path / "given" / "model.safetensors").is_file()


def test_a_given_checkpoints_tensors_can_be_resident(bench: Bench, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "given.safetensors", {"large": ("F32", (MIB // 2,))})
    path = str(tmp_path / "given.safetensors")
    found = bench.run(sources=["resident"], sinks=["land"], checkpoint=path, shapes=[])
    (row,) = found["rows"]
    assert (row["nbytes"], row["failure"]) == (2 * MIB, None)
