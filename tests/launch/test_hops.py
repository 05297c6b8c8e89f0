"""The hops of a chain: connected between neighbours only, with as many connections as asked for."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from packcast.errors import RendezvousError, TransferError
from packcast.launch import hops
from packcast.launch.hops import open_hops
from tests.helpers.hops import open_all


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_one_root_needs_no_hop_back_to_it(num_ranks: int) -> None:
    ends = open_all(list(range(num_ranks)), [0])
    assert [before is not None for before, _ in ends] == [False] + [True] * (num_ranks - 1)
    assert [after is not None for _, after in ends] == [True] * (num_ranks - 1) + [False]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_roots_have_a_hop_to_every_rank_and_from_it(num_ranks: int) -> None:
    ends = open_all(list(range(num_ranks)), list(range(num_ranks)))
    assert all(hop is not None for pair in ends for hop in pair)


def test_alone_there_is_no_hop() -> None:
    assert open_all([0], [0]) == [(None, None)]


def test_pieces_pass_in_order_over_several_connections_and_a_cut_ends_both_sides() -> None:
    (_, after), (before, _) = open_all([0, 1], [0], connections=3)
    assert after is not None
    assert before is not None
    sent = [torch.full((100,), i) for i in range(10)]
    received = [torch.zeros_like(tensor) for tensor in sent]
    works = [
        hop.start(tensor) for hop, data in ((after, sent), (before, received)) for tensor in data
    ]
    for work in works:
        work.wait()
    assert torch.stack(received).equal(torch.stack(sent))

    left = [before.start(tensor) for tensor in received]
    before.cut()
    for work in left:
        with pytest.raises(RuntimeError):
            work.wait()
    with pytest.raises(RuntimeError):
        after.start(sent[0]).wait()


def open_own(
    store: dist.Store, timeout_s: float, check: Callable[[], object] = lambda: None
) -> None:
    """As rank 0 of two."""
    open_hops([0, 1], [0], rank=0, store=store, timeout_s=timeout_s, interface="lo", check=check)


def store_with_a_silent_neighbour() -> dist.Store:
    """Rank 1 has said that it is about to connect, and then does nothing."""
    store = dist.HashStore()
    dist.PrefixStore("hop-0-1", store).set("here-1", "node2")
    return store


def test_a_neighbour_that_never_comes_is_named() -> None:
    with pytest.raises(RendezvousError, match="rank 0 and rank 1 could not be connected"):
        open_own(dist.HashStore(), timeout_s=0.5)


def test_a_neighbour_that_does_not_answer_is_named_with_its_host_and_a_firewall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hops, "_CONNECT_LIMIT_S", 0.5)
    with pytest.raises(RendezvousError, match=r"rank 1 \(node2\) could not be .* on lo") as caught:
        open_own(store_with_a_silent_neighbour(), timeout_s=3.0)
    assert "firewall" in (caught.value.hint or "")


@pytest.mark.parametrize("store", [dist.HashStore, store_with_a_silent_neighbour])
def test_a_failure_ends_the_wait_for_a_neighbour(store: Callable[[], dist.Store]) -> None:
    started = time.monotonic()

    def check() -> None:
        if time.monotonic() > started + 0.3:
            raise TransferError("lost rank 1")

    with pytest.raises(TransferError, match="lost rank 1"):
        open_own(store(), timeout_s=60.0, check=check)
