"""A chain of ranks: its order, its bytes through real processes over gloo, its ends."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from packcast.packed.chain import Chain, GlooHop
from packcast.packed.chain_order import (
    chain_order,
    hops_of,
    neighbours,
)
from tests.helpers.commands import Command, Commands
from tests.helpers.hops import open_all
from tests.helpers.waiting import Waiter
from tests.packed.chain_rank import Case, Outcome

pytestmark = pytest.mark.usefixtures("kind_of_hops")

KIB = 1 << 10
PROMPT_S = 10.0  # from the verdict to the last survivor's end; it takes about one


class Ranks:
    """The processes of a case."""

    def __init__(self, commands: Commands, folder: Path) -> None:
        self._commands = commands
        self._folder = folder
        self.started: list[Command] = []

    def start(self, case: Case) -> None:
        path = self._folder / "case"
        path.write_text(json.dumps(asdict(case)))
        for rank in range(len(case.order)):
            argv: list[str | Path] = [
                sys.executable,
                "-m",
                "tests.packed.chain_rank",
                path,
                str(rank),
            ]
            self.started.append(self._commands.start_warm(argv))

    def outcome(self, rank: int, limit_s: float = 60.0) -> Outcome:
        """Waited for until the process has ended, well."""
        ended = self.started[rank].wait(limit_s)
        assert ended.returncode == 0, ended.stderr
        return Outcome(**json.loads(ended.stdout))

    def outcomes(self) -> list[Outcome]:
        return [self.outcome(rank) for rank in range(len(self.started))]

    def tell(self, verdict: str) -> None:
        """The control channel of these ranks."""
        (self._folder / "partial").write_text(verdict)
        (self._folder / "partial").rename(self._folder / "verdict")


@pytest.fixture
def ranks(commands: Commands, tmp_path: Path) -> Ranks:
    return Ranks(commands, tmp_path)


def chunks_of(roots: list[int], count: int, most: int) -> list[tuple[int, int]]:
    """Roots take turns; sizes are random, from one byte on."""
    dice = random.Random(count)
    return [
        (roots[i % len(roots)], dice.choice([1, most, dice.randint(1, most)])) for i in range(count)
    ]


def test_ranks_of_one_host_are_adjacent_and_hosts_come_by_their_lowest_rank() -> None:
    assert chain_order(["b", "a", "b", "c", "a"]) == [0, 2, 1, 4, 3]
    assert chain_order(["a"] * 3) == [0, 1, 2]
    assert chain_order([]) == []


def test_a_chain_begins_at_its_root_and_goes_once_through_all() -> None:
    order = [0, 2, 1, 4, 3]
    for root in order:
        rank: int | None = root
        before: int | None = None
        met = []
        while rank is not None:
            assert neighbours(order, root, rank)[0] == before
            met.append(rank)
            before, rank = rank, neighbours(order, root, rank)[1]
        assert sorted(met) == [0, 1, 2, 3, 4]
    assert neighbours([0], 0, 0) == (None, None)
    assert neighbours([0, 1], 1, 0) == (1, None)


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_the_hops_are_those_that_some_chunk_passes(num_ranks: int) -> None:
    order = list(range(num_ranks))
    for roots in ([0], [num_ranks - 1], order):
        pairs = {(rank, neighbours(order, root, rank)[1]) for root in roots for rank in order}
        hops = hops_of(order, roots)
        assert sorted(hops) == sorted(pair for pair in pairs if pair[1] is not None)


def test_connecting_hops_takes_at_most_three_rounds() -> None:
    """If each rank connects its own in the order of the list, both ends at the same time."""
    for num_ranks in range(2, 40):
        assert num_rounds(num_ranks) <= 3


def num_rounds(num_ranks: int) -> int:
    hops = hops_of(range(num_ranks), range(num_ranks))
    rounds = 0
    while hops:
        waits_for = [next(hop for hop in hops if rank in hop) for rank in sorted({*sum(hops, ())})]
        hops = [hop for hop in hops if waits_for.count(hop) < 2]
        rounds += 1
        assert rounds <= num_ranks
    return rounds


@pytest.mark.parametrize(
    ("order", "roots", "num_buffers"),
    [
        ([0, 1], [0], 1),
        ([0, 1], [0], 4),
        ([0, 1, 2], [0], 2),
        ([*range(8)], [0], 2),
        ([*range(8)], [0], 4),
        ([0, 2, 1, 3], [0, 1, 2, 3], 1),
        ([0, 2, 1, 3], [0, 1, 2, 3], 4),
        ([0, 2, 1, 3], [3, 1], 2),
    ],
)
def test_every_rank_has_every_byte_and_none_sends_more_than_once(
    ranks: Ranks, order: list[int], roots: list[int], num_buffers: int
) -> None:
    case = Case(
        order=order,
        chunks=chunks_of(roots, 30, 100 * KIB),
        num_buffers=num_buffers,
        piece_nbytes=24 * KIB,
        connections=2 if num_buffers == 4 else 1,
        slow_rank=order[-1] if num_buffers == 2 else len(order) // 2,
    )
    ranks.start(case)
    outcomes = ranks.outcomes()
    nbytes = sum(nbytes for _, nbytes in case.chunks)
    assert [(o.error, o.wrong) for o in outcomes] == [("", [])] * len(order)
    assert sum(o.sent_nbytes for o in outcomes) == (len(order) - 1) * nbytes
    assert all(o.sent_nbytes <= nbytes for o in outcomes)


@pytest.mark.parametrize("by_signal", [signal.SIGKILL, signal.SIGSTOP, None])
def test_a_lost_rank_ends_the_others_within_seconds_of_the_verdict(
    ranks: Ranks, by_signal: signal.Signals | None
) -> None:
    """If all are alive, no thread of gloo is left that could write into freed memory."""
    case = Case(
        order=[0, 1, 2, 3],
        chunks=[(0, 16 << 20)] * 16,
        num_buffers=4,
        piece_nbytes=4 << 20,
        lost_rank=2,
        by_signal=by_signal,
    )
    ranks.start(case)
    ranks.started[2].read_until("lost")
    told = time.monotonic()
    ranks.tell("lost rank 2")
    others = [ranks.outcome(rank, PROMPT_S) for rank in (0, 1, 3)]
    assert time.monotonic() - told < PROMPT_S
    assert all(outcome.error for outcome in others)
    assert all(outcome.wrong == [] for outcome in others)
    if by_signal == signal.SIGSTOP:  # no connection ends: only the control channel notices
        assert {outcome.error for outcome in others} == {"TransferError: lost rank 2"}
    if by_signal is None:
        failed = ranks.outcome(2)
        assert failed.error == "TransferError: its own error"
        assert [outcome.threads_left for outcome in (*others, failed)] == [0] * 4


def chains_of_two() -> list[Chain]:
    ends = open_all([0, 1], [0])
    return [Chain(*ends[rank], rank=rank, order=[0, 1], check=lambda: None) for rank in (0, 1)]


def test_closing_a_chain_wakes_whoever_waits_in_it() -> None:
    memory = torch.zeros(1000, dtype=torch.uint8)
    _first, last = chains_of_two()
    last.begin(memory, 0)
    waiter = Waiter(lambda: last.carry(memory, 0))
    assert waiter.waits()
    last.close()
    with pytest.raises(RuntimeError):
        waiter.result()
    last.close()  # once more does nothing
    with pytest.raises(RuntimeError, match="has been closed"):
        last.begin(memory, 0)


def test_a_neighbour_that_takes_nothing_does_not_hold_up_a_close() -> None:
    memory = torch.zeros(1000, dtype=torch.uint8)
    first, last = chains_of_two()
    for _ in range(400):  # more than a socket holds messages
        first.carry(memory, 0)
    closing = Waiter(first.close)
    closing.result()
    last.close()


def test_the_connections_end_with_the_chain_though_a_slot_keeps_an_event_of_it() -> None:
    ends = open_all([0, 1], [0])
    hops = [hop for pair in ends for hop in pair if hop is not None]
    shared = [weakref.ref(hop.group if isinstance(hop, GlooHop) else hop) for hop in hops]
    memory = torch.arange(1000)
    chains = [Chain(*ends[rank], rank=rank, order=[0, 1], check=lambda: None) for rank in (0, 1)]
    del ends, hops
    chains[1].begin(memory, 0)
    events = [chain.carry(memory, 0) for chain in chains]
    for event in events:
        event.synchronize()
    for chain in chains:
        chain.close()
    assert [it() for it in shared] == [None, None]
    assert all(event.passed() for event in events)


def test_an_event_passes_when_the_next_rank_has_the_chunk() -> None:
    memory = torch.arange(1000)
    chains = chains_of_two()
    event = chains[0].carry(memory, 0)
    assert not event.passed()
    assert not event.passes_within(0.05)
    waited_until = time.perf_counter()
    received = torch.zeros_like(memory)
    chains[1].begin(received, 0)
    assert chains[1].carry(received, 0).passed()
    assert event.passes_within(10)
    assert event.passed()
    assert event.passed_at > waited_until
    assert received.equal(memory)
