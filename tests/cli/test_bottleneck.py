"""Claims about who is named as the one that a transfer waits on."""

from __future__ import annotations

from packcast.cli.bottleneck import Bottleneck, culprit_of
from packcast.view import Snapshot, WorkerState

from .conftest import snapshot_of


def test_a_worker_that_waits_for_its_disk_holds_up_those_that_wait_for_bytes() -> None:
    assert culprit_of(snapshot_of(20, workers={1: 20, 2: 30}, rank_1="write")) == (1, "write")


def test_of_several_that_write_the_slowest_is_named() -> None:
    workers = {1: 30, 2: 20, 3: 40}
    stages = {f"rank_{rank}": "write" for rank in workers}
    assert culprit_of(snapshot_of(20, workers=workers, **stages)) == (2, "write")


def test_the_sender_is_named_where_all_that_was_read_is_sent() -> None:
    assert culprit_of(snapshot_of(20, workers={1: 20}, mine="read")) == (0, "read")


def test_the_network_is_named_where_more_was_read_than_sent() -> None:
    ahead = Snapshot(
        20, 100, {"read": 60, "broadcast": 20}, {1: WorkerState(20, "broadcast")}, "", "read"
    )
    assert culprit_of(ahead) == (None, "network")


def test_at_the_end_the_one_that_makes_its_copy_durable_is_named() -> None:
    assert culprit_of(snapshot_of(100, workers={1: 100, 2: 100}, rank_2="sync")) == (2, "sync")
    assert culprit_of(snapshot_of(100, workers={1: 100, 2: 100})) is None


def test_what_it_waits_on_is_said_once_it_lasts_and_for_how_long() -> None:
    hold_up = Bottleneck()
    said = []
    for second in range(13):
        hold_up.add((1, "write"), float(second))
        said.append(hold_up.line({1: "hostb"}, float(second)))
    assert said[:2] == [None, None]
    assert said[12] == "waiting on rank 1 (hostb): write, 12 s"


def test_a_glance_between_two_pieces_changes_nothing() -> None:
    hold_up = Bottleneck()
    for tenth in range(1, 100):
        hold_up.add((None, "network") if tenth % 5 == 0 else (1, "write"), tenth / 10)
    assert hold_up.line({}, 10.0) == "waiting on rank 1: write, 10 s"


def test_another_culprit_begins_anew() -> None:
    hold_up = Bottleneck()
    hold_up.add((1, "write"), 0.0)
    for second in range(5, 8):
        hold_up.add((2, "verify"), float(second))
    assert hold_up.line({}, 7.0) == "waiting on rank 2: verify, 2 s"


def test_a_worker_says_that_it_waits_for_its_own_disk() -> None:
    hold_up = Bottleneck()
    for second in range(4):
        hold_up.add(culprit_of(snapshot_of(20, mine="write")), float(second))
    assert hold_up.line({}, 3.0) == "waiting on this host: write, 3 s"
    assert culprit_of(snapshot_of(20, mine="broadcast")) is None
