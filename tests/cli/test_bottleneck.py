"""Claims about who is named as the one that a transfer waits on."""

from __future__ import annotations

from packcast.cli.bottleneck import HERE, Bottleneck, culprit_of
from packcast.view import Snapshot

from .conftest import snapshot_of


def test_a_worker_that_waits_for_its_disk_holds_up_those_that_wait_for_bytes() -> None:
    assert culprit_of(snapshot_of(20, workers={1: 20, 2: 30}, rank_1="write")) == (1, "write")


def test_a_worker_that_does_not_get_connected_is_named() -> None:
    assert culprit_of(snapshot_of(0, workers={1: 0}, rank_1="connect")) == (1, "connect")
    hold_up = Bottleneck()
    hold_up.add(snapshot_of(0, workers={1: 0}, rank_1="connect"), 0.0)
    assert hold_up.state(1) == "connecting"


def test_of_several_that_write_the_slowest_is_named() -> None:
    workers = {1: 30, 2: 20, 3: 40}
    stages = {f"rank_{rank}": "write" for rank in workers}
    assert culprit_of(snapshot_of(20, workers=workers, **stages)) == (2, "write")


def test_the_sender_says_that_its_own_disk_is_slow() -> None:
    assert culprit_of(snapshot_of(20, workers={1: 20}, mine="read")) == (HERE, "read")
    assert culprit_of(snapshot_of(20, workers={1: 20}, mine="h2d")) == (HERE, "h2d")


def test_what_no_rank_waits_for_by_itself_is_the_network() -> None:
    assert culprit_of(snapshot_of(20, workers={1: 20}, mine="broadcast")) == (None, "broadcast")


def test_a_rate_that_was_asked_for_is_no_slow_disk() -> None:
    slow = snapshot_of(20, workers={1: 20}, rank_1="write", mine="limit")
    assert culprit_of(slow) == (None, "limit")
    assert said_of([slow] * 4)[3] == "limited by --max-rate"


def test_at_the_end_the_one_that_makes_its_copy_durable_is_named() -> None:
    assert culprit_of(snapshot_of(100, workers={1: 100, 2: 100}, rank_2="sync")) == (2, "sync")
    assert culprit_of(snapshot_of(100, workers={1: 100, 2: 100})) is None


def test_a_long_wait_is_shown_with_its_stage_and_duration() -> None:
    said = said_of([WRITES] * 13, {1: "hostb"})
    assert said[:2] == [None, None]
    assert said[12] == "waiting on rank 1 (hostb): write, 12 s"


def test_a_glance_between_two_pieces_changes_nothing() -> None:
    hold_up = Bottleneck()
    for tenth in range(1, 100):
        hold_up.add(RECEIVES if tenth % 5 == 0 else WRITES, tenth / 10)
    assert hold_up.line({}, 10.0) == "waiting on rank 1: write, 10 s"
    assert hold_up.state(1) == "writing"


def test_another_culprit_begins_anew() -> None:
    hold_up = Bottleneck()
    hold_up.add(WRITES, 0.0)
    for second in range(5, 8):
        hold_up.add(snapshot_of(20, workers={1: 30, 2: 20}, rank_2="verify"), float(second))
    assert hold_up.line({}, 7.0) == "waiting on rank 2: verify, 2 s"


def test_who_is_done_is_not_waited_for() -> None:
    done = snapshot_of(20, workers={1: 100, 2: 20})
    hold_up = Bottleneck()
    for tenth in range(30):
        hold_up.add(WRITES, tenth / 10)
    hold_up.add(done, 3.0)
    assert hold_up.line({}, 3.0) is None
    assert hold_up.state(1) == "done"


def test_a_worker_says_that_it_waits_for_its_own_disk() -> None:
    assert said_of([snapshot_of(20, mine="write")] * 4)[3] == "waiting on this host: write, 3 s"
    receiving = [snapshot_of(done) for done in range(20, 24)]
    assert said_of(receiving)[3] is None


def test_a_worker_to_which_nothing_comes_says_so() -> None:
    said = said_of([snapshot_of(20)] * 9)
    assert said[8] == "waiting for bytes from the other ranks, 7 s"


def test_a_worker_that_is_done_says_that_it_waits_for_the_others() -> None:
    done = snapshot_of(100, mine="")
    assert said_of([done] * 4)[3] == "complete here, waiting for the other workers, 3 s"


WRITES = snapshot_of(20, workers={1: 20, 2: 30}, rank_1="write")
RECEIVES = snapshot_of(20, workers={1: 20, 2: 30})


def said_of(looks: list[Snapshot], hosts: dict[int, str] | None = None) -> list[str | None]:
    """What is said after each of the looks, a second apart."""
    hold_up, said = Bottleneck(), []
    for second, look in enumerate(looks):
        hold_up.add(look, float(second))
        said.append(hold_up.line(hosts or {}, float(second)))
    return said
