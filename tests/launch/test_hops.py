"""The hops of a chain: connected between neighbours only, with as many connections as asked for."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from packcast.errors import RendezvousError, TransferError, UsageError
from packcast.launch import hops
from packcast.launch.hops import open_hops
from packcast.packed import memory_hop
from packcast.packed.chain import GlooHop
from tests.helpers.commands import eventually
from tests.helpers.hops import open_all, open_pair
from tests.helpers.processes import num_descriptors


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


@pytest.mark.usefixtures("kind_of_hops")
def test_pieces_pass_in_order_and_a_cut_ends_both_sides() -> None:
    after, before = open_pair(connections=3)
    sent = [torch.full((100,), i) for i in range(10)]
    received = [torch.zeros_like(tensor) for tensor in sent]
    leaving = [after.start(tensor) for tensor in sent]
    arriving = [before.start(tensor) for tensor in received]
    for work in (*arriving, *leaving):  # through memory, whoever waits for a piece copies it
        work.wait()
        assert work.is_completed()
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


# -- hops through memory -------------------------------------------------------------------------


@pytest.fixture
def readable() -> None:
    """Skips where not even this process's own memory may be read so."""
    secret, found = ctypes.create_string_buffer(b"secret"), ctypes.create_string_buffer(7)
    try:
        memory_hop.read_memory(os.getpid(), ctypes.addressof(secret), ctypes.addressof(found), 7)
    except OSError as error:
        pytest.skip(f"process_vm_readv: {error.strerror}")
    assert found.value == b"secret"


def kinds() -> list[str]:
    """Of the two ends of a hop."""
    return [type(hop).__name__ for hop in open_pair()]


@pytest.mark.usefixtures("readable")
def test_ranks_of_one_host_share_memory_unless_they_are_told_not_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert kinds() == ["GivingHop", "TakingHop"]
    monkeypatch.setenv("PACKCAST_HOPS", "gloo")
    assert kinds() == ["GlooHop", "GlooHop"]
    monkeypatch.setenv("PACKCAST_HOPS", "tcp")
    with pytest.raises(UsageError, match="PACKCAST_HOPS is 'tcp'"):
        open_own(dist.HashStore(), timeout_s=0.5)


@pytest.mark.parametrize("what", ["forbidden", "another network namespace", "other bytes"])
def test_where_memory_cannot_be_read_gloo_connects(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def forbidden(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if what == "forbidden":
        monkeypatch.setattr(memory_hop, "read_memory", forbidden)
    elif what == "other bytes":  # another process that happens to have that pid here
        monkeypatch.setattr(memory_hop, "read_memory", lambda *_: None)
    else:
        listen = memory_hop.listen
        monkeypatch.setattr(memory_hop, "listen", lambda: (listen()[0], "packcast-elsewhere"))
    num_before = num_descriptors()
    after, before = open_pair()
    assert [type(after), type(before)] == [GlooHop, GlooHop]
    sent, received = torch.arange(100), torch.zeros(100, dtype=torch.int64)
    works = [after.start(sent), before.start(received)]
    for work in works:
        work.wait()
    assert received.equal(sent)
    del works, work, after, before
    eventually(lambda: num_descriptors() <= num_before, "the connections' end")


def test_a_neighbour_on_another_host_is_connected_over_gloo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = iter(["one", "other"])
    monkeypatch.setattr(hops, "boot_id", lambda: next(ids))
    assert kinds() == ["GlooHop", "GlooHop"]


@pytest.mark.usefixtures("readable")
def test_a_piece_of_another_size_is_an_error_on_both_sides() -> None:
    after, before = open_pair()
    leaving, arriving = after.start(torch.zeros(100)), before.start(torch.zeros(99))
    with pytest.raises(RuntimeError, match="piece 0 of 400 bytes"):
        arriving.wait()
    before.close()
    with pytest.raises(RuntimeError, match="closed the connection"):
        leaving.wait()
    assert leaving.is_completed()


@pytest.mark.usefixtures("readable")
def test_many_more_pieces_than_a_socket_holds_messages_pass() -> None:
    after, before = open_pair()
    sent = torch.arange(2000)
    received = torch.zeros_like(sent)
    arriving = [before.start(piece) for piece in received.split(1)]

    def receive() -> None:
        for work in arriving:
            work.wait()

    receiving = threading.Thread(target=receive)
    receiving.start()
    for work in [after.start(piece) for piece in sent.split(1)]:
        work.wait(timedelta(seconds=20))
    receiving.join(20)
    assert received.equal(sent)


@pytest.mark.usefixtures("readable")
def test_what_is_read_after_the_other_end_has_closed_does_not_count() -> None:
    after, before = open_pair()
    sent = torch.ones(100)
    leaving = after.start(sent)
    after.close()
    sent.zero_()  # it may: nothing is under way any more
    assert leaving.is_completed()
    arriving = before.start(torch.zeros(100))
    with pytest.raises(RuntimeError, match="next process on this host"):
        arriving.wait(timedelta(seconds=5))
