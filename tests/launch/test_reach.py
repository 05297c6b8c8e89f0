"""Before NCCL connects the ranks, each tries a connection to the next one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist

from packcast.errors import PackcastError, RendezvousError, TransferError
from packcast.launch import reach
from packcast.launch.processgroup import open_process_group
from packcast.launch.reach import check_ring, chosen_by_nccl
from tests.helpers.sockets import full_listener


def check_as(
    rank: int,
    store: dist.Store,
    world_size: int = 2,
    check: Callable[[], object] = lambda: None,
    timeout_s: float = 30.0,
) -> None:
    check_ring(
        rank=rank,
        world_size=world_size,
        store=store,
        timeout_s=timeout_s,
        interface="lo",
        check=check,
    )


def says(store: dist.Store, rank: int, **changed: object) -> None:
    """The rank has said where it listens, and does nothing else."""
    said = {"host": "node2", "address": "127.0.0.1", "port": 1} | changed
    store.set(f"here-{rank}", json.dumps(said))


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_that_reach_each_other_go_on(num_ranks: int) -> None:
    store = dist.HashStore()
    done: list[int] = []

    def act(rank: int) -> None:
        check_as(rank, store, num_ranks)
        done.append(rank)

    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(num_ranks))


def test_a_rank_behind_a_firewall_is_named_with_host_port_interface_and_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reach, "REACH_LIMIT_S", 0.3)
    monkeypatch.setattr(reach, "ephemeral_ports", lambda: "29420-29999")
    store = dist.HashStore()
    with full_listener() as port:
        says(store, 1, port=port)
        with pytest.raises(RendezvousError) as caught:
            check_as(0, store)
    assert f"to rank 1 (node2) at 127.0.0.1:{port} on lo" in caught.value.message
    assert caught.value.message.endswith("no answer within 0.3 s")
    assert "firewall" in (caught.value.hint or "")
    assert "29420-29999" in (caught.value.hint or "")


def test_a_rejected_connection_is_an_error_at_once() -> None:
    store = dist.HashStore()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        says(store, 1, port=taken.getsockname()[1])
        with pytest.raises(RendezvousError, match=r"rank 1 \(node2\) at .*: Connection refused"):
            check_as(0, store)


def test_a_rank_that_cannot_be_reached_is_told_why() -> None:
    """The rank before it has raised, and tells the others over the control channel."""
    store = dist.HashStore()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        says(store, 1, port=listener.getsockname()[1])
        said: list[bool] = []

        def check() -> None:
            if store.check(["reached-1"]):
                said.append(True)
                raise TransferError("rank 1 cannot connect to rank 0")

        with pytest.raises(TransferError, match="rank 1 cannot connect to rank 0"):
            check_as(0, store, check=check)
    assert said


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 has not come within 0.2 s"):
        check_as(0, dist.HashStore(), timeout_s=0.2)


@pytest.mark.parametrize("changed", [{"port": 70_000}, {"address": "node2"}, {"more": 1}])
def test_what_anybody_may_have_written_is_checked(changed: dict[str, object]) -> None:
    store = dist.HashStore()
    says(store, 1, **changed)
    with pytest.raises(RendezvousError, match="rank 1 does not say where it listens"):
        check_as(0, store)


def test_ranks_whose_interface_is_not_known_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=none-of-these")
    store = dist.HashStore()
    store.set("reached-0", "")
    says(store, 1, address=None, port=0)
    check_as(0, store)
    assert json.loads(store.get("here-0"))["address"] is None


def test_nccl_is_not_started_where_ranks_do_not_reach_each_other() -> None:
    import torch

    store = dist.HashStore()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        says(dist.PrefixStore("group", store), 1, port=taken.getsockname()[1])
        with pytest.raises(PackcastError, match="cannot connect to rank 1"):
            open_process_group(
                "nccl",
                rank=0,
                world_size=2,
                store=store,
                device=torch.device("cpu"),
                timeout_s=30.0,
                interface="lo",
                check=lambda: None,
            )


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("=eth1", "eth1"),
        ("eth", "eth10"),
        ("eth1", "eth10"),
        ("ib0,eth1", "eth10"),
        ("=ib0,eth1", "eth1"),
        ("^lo,eth", "ib0"),
        ("^=lo", "eth10"),
        ("eth1:29500", "eth10"),
        ("^docker,lo,virbr", "eth10"),
        ("wlan", None),
    ],
)
def test_the_interface_is_chosen_as_nccl_chooses_it(wanted: str, chosen: str | None) -> None:
    assert chosen_by_nccl(wanted, ["lo", "eth10", "eth1", "ib0"]) == chosen


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["lo", "eth0", "ib0"], "ib0"),
        (["lo", "docker0", "eth0"], "eth0"),
        (["lo", "docker0"], "docker0"),
        (["lo"], "lo"),
    ],
)
def test_where_no_interface_is_given_it_is_the_one_that_nccl_prefers(
    names: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_FAMILY", raising=False)
    addresses = {f"10.0.0.{i}": name for i, name in enumerate(names)}
    monkeypatch.setattr(reach, "interfaces", lambda: iter(addresses.items()))
    name, address = reach._nccl_address(None)
    assert name == chosen
    assert address is not None
    assert addresses[address] == chosen
