"""Launch environments, read; and the store through which ranks find the sender."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import pytest

from packcast.errors import CheckpointError, PackcastError, RendezvousError
from packcast.group import store as stores
from packcast.group.launch import (
    Launch,
    detect_launch,
    first_host,
    reachable_host,
    slurm_nodelist,
    slurm_port,
)
from packcast.group.store import (
    await_address,
    connect_store,
    open_store,
    publish_address,
    publish_failure,
    serve_store,
    settle_sender,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "64",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}


def test_torchrun_is_recognised_by_its_variables() -> None:
    expected = Launch("torchrun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert detect_launch(TORCHRUN) == expected


def test_torchrun_inside_slurm_is_torchrun() -> None:
    assert detect_launch(SLURM | TORCHRUN).kind == "torchrun"


def test_srun_is_recognised_by_the_steps_own_numbers() -> None:
    expected = Launch("slurm", rank=6, world_size=7, local_rank=0, local_world_size=1)
    assert detect_launch(SLURM) == expected
    assert detect_launch(SLURM | {"SLURM_NODEID": "2"}).local_world_size == 2


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "3"},
        {name: SLURM[name] for name in SLURM if name != "SLURM_STEP_ID"},  # a batch script
        SLURM | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # an interactive step of salloc
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_without_a_launcher_there_is_one_rank(environ: dict[str, str]) -> None:
    assert detect_launch(environ) == Launch("none", 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (TORCHRUN | {"RANK": "five"}, "RANK is 'five', not a number"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 in a world of 8"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT is not"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
    ],
)
def test_broken_launch_variables_are_named(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(RendezvousError, match=sentence):
        detect_launch(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu3", "gpu07"),
        ("gpu[3]", "gpu3"),
        ("rack[1-2]n[03,05-07],x", "rack1n03"),
        ("a-b[1-2]-ib.cluster,c", "a-b1-ib.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_an_empty_node_list_is_an_error() -> None:
    with pytest.raises(RendezvousError, match="names no host"):
        first_host("")
    with pytest.raises(RendezvousError, match="SLURM_STEP_NODELIST"):
        slurm_nodelist({})


def test_steps_of_one_job_have_ports_of_their_own() -> None:
    ports = {slurm_port(SLURM | {"SLURM_STEP_ID": str(step)}) for step in range(20)}
    assert len(ports) == 20
    assert all(20_000 <= port < 30_000 for port in ports)


def test_towards_loopback_this_host_is_loopback() -> None:
    assert reachable_host(("127.0.0.1", 29500)) == "127.0.0.1"
    assert reachable_host(("localhost", 29500)) in ("127.0.0.1", "::1")


def test_a_name_that_resolves_to_loopback_is_not_taken_for_an_address_others_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routes = {("myhost", 29500): "127.0.1.1", ("192.0.2.1", 9): "10.0.0.7"}
    monkeypatch.setattr("packcast.group.launch._local_address", routes.get)
    assert reachable_host(("myhost", 29500)) == "10.0.0.7"
    assert reachable_host(None) == "10.0.0.7"
    routes.clear()
    assert reachable_host(("myhost", 29500)) == "127.0.0.1"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def store() -> Store:
    from torch._C._distributed_c10d import HashStore

    return HashStore()


def settle_all(
    store: Store, *roles: Literal["send", "recv"], world_size: int | None = None
) -> list[int]:
    world = world_size or len(roles)
    with ThreadPoolExecutor(len(roles)) as pool:
        settled = [
            pool.submit(settle_sender, store, Launch("torchrun", rank, world, 0, 1), role, 0.5)
            for rank, role in enumerate(roles)
        ]
        return [future.result() for future in settled]


def test_the_lowest_rank_that_sends_is_the_sender(store: Store) -> None:
    assert settle_all(store, "recv", "send", "recv", "send") == [1, 1, 1, 1]


def test_ranks_above_the_sender_need_not_have_come_yet(store: Store) -> None:
    assert settle_all(store, "send", world_size=5) == [0]


def test_no_sender_is_an_error_on_every_rank(store: Store) -> None:
    with pytest.raises(RendezvousError, match="no rank ran `packcast send`"):
        settle_all(store, "recv", "recv")


def test_silent_ranks_are_named_at_the_deadline(store: Store) -> None:
    with pytest.raises(RendezvousError, match=r"ranks 1, 2 have not joined within 0\.50 s"):
        settle_all(store, "recv", world_size=3)


def test_the_senders_address_reaches_the_others(store: Store) -> None:
    threading.Timer(0.1, publish_address, (store, ("10.0.0.1", 4711))).start()
    assert await_address(store, 5.0) == ("10.0.0.1", 4711)


def test_a_sender_that_failed_first_gives_all_its_own_error(store: Store) -> None:
    publish_failure(store, CheckpointError("model.safetensors is cut off", hint="copy it again"))
    for wait in (
        lambda: await_address(store, 5.0),
        lambda: settle_sender(store, Launch("torchrun", 1, 2, 0, 1), "recv", 5.0),
    ):
        with pytest.raises(CheckpointError, match="is cut off") as caught:
            wait()
        assert caught.value.hint == "copy it again"


def test_a_sender_that_never_listens_ends_the_wait(store: Store) -> None:
    with pytest.raises(RendezvousError, match=r"not said where it listens within 0\.20 s"):
        await_address(store, 0.2)


def test_ranks_meet_in_a_store_on_the_launchers_port_and_rank_0_need_not_be_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(open_store, Launch("torchrun", 1, 2, 1, 2), environ, 10.0)
        time.sleep(0.1)
        first = open_store(Launch("torchrun", 0, 2, 0, 2), environ, 10.0)
        publish_address(first, ("127.0.0.1", 1))
        assert await_address(late.result(), 5.0) == ("127.0.0.1", 1)


def test_the_next_transfer_of_a_process_meets_in_the_same_store_under_keys_of_its_own() -> None:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    host, client = Launch("torchrun", 0, 2, 0, 2), Launch("torchrun", 1, 2, 1, 2)
    publish_address(open_store(host, environ, 10.0, call=0), ("127.0.0.1", 1))
    early = open_store(client, environ, 10.0, call=1)  # before rank 0 is there again
    with pytest.raises(RendezvousError, match="not said where it listens"):
        await_address(early, 0.1)
    publish_address(open_store(host, environ, 10.0, call=1), ("127.0.0.1", 2))
    assert await_address(early, 5.0) == ("127.0.0.1", 2)


def test_under_slurm_rank_0_serves_the_store_on_the_first_host() -> None:
    environ = SLURM | {"SLURM_STEP_NODELIST": "localhost"}
    port = free_port()
    host = open_store(Launch("slurm", 0, 2, 0, 2), environ, 10.0, port)
    client = open_store(Launch("slurm", 1, 2, 1, 2), environ, 10.0, port)
    publish_address(host, ("127.0.0.1", 2))
    assert await_address(client, 5.0) == ("127.0.0.1", 2)


def test_an_agents_store_is_joined_and_a_restart_sees_no_old_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent, port = serve_store("127.0.0.1", 10.0)
    launch = Launch("torchrun", 0, 2, 0, 2)
    environ = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    publish_address(open_store(launch, environ, 10.0), ("127.0.0.1", 3))
    assert await_address(open_store(launch, environ, 10.0), 5.0) == ("127.0.0.1", 3)
    restarted = open_store(launch, environ | {"TORCHELASTIC_RESTART_COUNT": "1"}, 10.0)
    with pytest.raises(RendezvousError):
        await_address(restarted, 0.1)
    del agent


def test_a_served_store_is_on_one_interface_only() -> None:
    held, port = serve_store("127.0.0.1", 10.0)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port)):
        pass
    assert connect_store("127.0.0.1", port, 5.0).check(["nothing"]) is False
    del held


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        environ = SLURM | {"SLURM_STEP_NODELIST": "localhost"}
        with pytest.raises(RendezvousError, match=f"localhost:{port}: the port is taken") as caught:
            open_store(Launch("slurm", 0, 2, 0, 2), environ, 1.0, port)
        assert caught.value.hint == "choose another port with --port"


def test_an_unreachable_store_is_one_line_and_no_stack(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with pytest.raises(RendezvousError, match=f"store at 127.0.0.1:{port}: Connection refused"):
        connect_store("127.0.0.1", port, 0.2)
    assert capfd.readouterr().err == ""


@pytest.fixture
def frozen() -> Iterator[int]:
    """A port where connections are taken but nobody ever answers, as of a stopped process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_frozen_store_does_not_hold_us_beyond_the_deadline(
    frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_GRACE_S", 0.3)
    started = time.monotonic()
    with pytest.raises(RendezvousError, match=f"store at 127.0.0.1:{frozen} does not answer"):
        connect_store("127.0.0.1", frozen, 0.3)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("call", [publish_failure, publish_address])
def test_a_store_that_hangs_is_reported_and_never_by_publish_failure(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[object, object], None]
) -> None:
    class Hanging:
        def set(self, key: str, value: str) -> None:
            threading.Event().wait(3)

    monkeypatch.setattr(stores, "_GRACE_S", 0.1)
    if call is publish_failure:
        call(Hanging(), PackcastError("x"))
    else:
        with pytest.raises(RendezvousError, match="does not answer"):
            call(Hanging(), ("127.0.0.1", 1))


def test_a_timeout_of_torchs_own_is_one_line(store: Store) -> None:
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RendezvousError, match=r"^it failed: [^\n]*$"):
        stores._answer_in(1.0, "it failed", lambda: store.get("nothing"))
