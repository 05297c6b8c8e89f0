"""Launch environments, read; and the store through which ranks find the sender."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import pytest

from packcast.errors import CheckpointError, PackcastError, RendezvousError
from packcast.launch import find_sender
from packcast.launch import store as stores
from packcast.launch.find_sender import (
    SenderAddress,
    await_address,
    await_routes,
    hosts_of,
    leave_failed_join,
    publish_address,
    publish_failure,
    settle_sender,
)
from packcast.launch.launchers import (
    Launch,
    detect_launch,
    first_host,
    mpi_port,
    rendezvous_address,
    slurm_nodelist,
    slurm_port,
)
from packcast.launch.rendezvous import Rendezvous, open_rendezvous
from packcast.launch.store import connect_store, join_served_store, serve_store
from tests.helpers.commands import hydra_rank, open_mpi_rank
from tests.helpers.sockets import full_listener

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

# Rank 5 of 8 on two hosts, by the launchers of Open MPI, and of MPICH and Intel MPI.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}

AT_1, AT_2 = SenderAddress(("127.0.0.1",), 1), SenderAddress(("127.0.0.1",), 2)


def test_torchrun_is_recognised_by_its_variables() -> None:
    expected = Launch("torchrun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert detect_launch(TORCHRUN) == expected


@pytest.mark.parametrize(
    ("environ", "is_one_host"),
    [
        (TORCHRUN, False),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, True),
        (TORCHRUN | {"MASTER_ADDR": "127.0.0.1"}, True),  # several torchruns on this host
        (TORCHRUN | {"MASTER_ADDR": "[::1]"}, True),
        (TORCHRUN | {"MASTER_ADDR": "localhost"}, True),
        # Set by hand: the highest rank must not think that its host has all of them.
        (
            {n: TORCHRUN[n] for n in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")} | {"RANK": "7"},
            False,
        ),
        (SLURM, False),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}, True),
        (TORCHRUN | {"PACKCAST_LAUNCH_FD": "9"}, True),
        (OPEN_MPI | MASTER, False),
        (open_mpi_rank("1", 1, 2), True),
        (HYDRA | MASTER, False),
        (HYDRA | MASTER | {"MASTER_ADDR": "localhost"}, True),
        (hydra_rank(1, 2), True),
    ],
)
def test_it_is_known_where_all_ranks_are_on_one_host(
    environ: dict[str, str], is_one_host: bool
) -> None:
    assert detect_launch(environ).is_one_host == is_one_host


def test_a_pod_of_an_operator_has_one_rank_and_ranks_set_by_hand_are_on_one_host() -> None:
    by_hand = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", *MASTER)}
    assert detect_launch(by_hand).local_rank == 5
    assert detect_launch(by_hand | {"PET_NODE_RANK": "5"}).local_rank == 0
    assert detect_launch(TORCHRUN | {"PET_NODE_RANK": "5"}).local_rank == 1


def test_ranks_of_nproc_are_known_by_what_they_inherit() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "3", "PACKCAST_LAUNCH_FD": "9"}
    assert detect_launch(environ) == Launch("nproc", 1, 3, 1, 3, is_one_host=True)


def test_torchrun_inside_slurm_is_torchrun() -> None:
    assert detect_launch(SLURM | TORCHRUN).kind == "torchrun"


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA])
def test_mpirun_is_recognised_by_its_variables(environ: dict[str, str]) -> None:
    expected = Launch("mpirun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert detect_launch(environ | MASTER) == expected
    assert detect_launch(environ | TORCHRUN).kind == "torchrun"  # started by mpirun, for each host


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA])
def test_mpirun_inside_slurm_is_mpirun(environ: dict[str, str]) -> None:
    # Its daemons are tasks of a step, whose numbers the ranks inherit.
    daemon = SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert detect_launch(daemon | environ | MASTER).kind == "mpirun"


def test_srun_that_serves_pmi_is_slurm() -> None:
    assert detect_launch(SLURM | {"PMI_RANK": "6", "PMI_SIZE": "7"}).kind == "slurm"


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA])
@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_mpirun_on_several_hosts_has_to_be_told_where_rank_0_is(
    environ: dict[str, str], missing: str
) -> None:
    with pytest.raises(RendezvousError, match=f"several hosts, but {missing} is not set") as caught:
        detect_launch(environ | {name: MASTER[name] for name in MASTER if name != missing})
    assert "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29400" in (caught.value.hint or "")


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
        open_mpi_rank("1", 0, 1),  # mpirun -n 1 bash
        hydra_rank(0, 1),
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
        (OPEN_MPI | MASTER | {"OMPI_COMM_WORLD_RANK": "8"}, "rank 8 in a world of 8"),
        (HYDRA | MASTER | {"PMI_SIZE": "all"}, "PMI_SIZE is 'all'"),
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


def test_launches_of_mpirun_on_one_host_have_ports_of_their_own() -> None:
    ports = {mpi_port(open_mpi_rank(str(pid), 0, 2)) for pid in range(4000, 4020)}
    assert len(ports) > 18
    assert all(20_000 <= port < 30_000 for port in ports)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def store() -> Store:
    from torch._C._distributed_c10d import HashStore

    return HashStore()


def test_a_route_that_comes_between_two_looks_is_not_missed() -> None:
    class Late:
        """The last route comes right after the first look at it; nobody publishes a failure."""

        num_looks = 0

        def check(self, keys: list[str], /) -> bool:
            is_last = "route" in keys[-1] and keys[-1].endswith("1")
            self.num_looks += is_last
            return "route" in keys[-1] and (not is_last or self.num_looks > 1)

        def get(self, key: str, /) -> bytes:
            return b"10.0.0.1"

        def set(self, key: str, value: str, /) -> None: ...

    launch = Launch("slurm", rank=0, world_size=2, local_rank=0, local_world_size=1)
    assert await_routes(Late(), launch, 5.0, lambda _: None) == {"10.0.0.1"}


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
    there = SenderAddress(("10.0.0.1", "10.1.0.1"), 4711, beside_store=True)
    threading.Timer(0.1, publish_address, (store, there)).start()
    assert await_address(store, 5.0) == there


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
    with pytest.raises(RendezvousError, match=r"published no address within 0\.20 s"):
        await_address(store, 0.2)


def two_ranks_by_hand() -> tuple[dict[str, str], Launch, Launch]:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return environ, Launch("torchrun", 0, 2, 0, 2), Launch("torchrun", 1, 2, 1, 2)


def test_ranks_meet_in_a_store_on_the_launchers_port_and_rank_0_need_not_be_first() -> None:
    environ, host, client = two_ranks_by_hand()
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(open_rendezvous, client, environ, 10.0)
        time.sleep(0.1)
        first = open_rendezvous(host, environ, 10.0)
        publish_address(first, AT_1)
        assert await_address(late.result(), 5.0) == AT_1
    late.result().close()
    first.close()


def is_free(environ: dict[str, str]) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(environ["MASTER_PORT"])))
            probe.listen()
        except OSError:
            return False
        return True


def test_the_launchers_port_is_free_once_the_meeting_is_closed_though_others_still_hold_it() -> (
    None
):
    environ, host, client = two_ranks_by_hand()
    with open_both(environ, host, client) as (first, second):
        assert not is_free(environ)
        first.close()
        assert is_free(environ)
        second.close()


def test_an_exception_that_is_kept_does_not_keep_the_port() -> None:
    environ, host, client = two_ranks_by_hand()
    with open_both(environ, host, client) as (first, second):
        with pytest.raises(RendezvousError) as kept:
            settle_sender(first, host, "recv", 0.05)
        leave = threading.Thread(target=leave_failed_join, args=(second, client, 5.0))
        leave.start()
        leave_failed_join(first, host, 5.0)
        assert is_free(environ)
        leave.join(5)
        assert kept.value.__traceback__


def test_after_a_failed_join_no_rank_leaves_before_the_port_is_free() -> None:
    environ, host, client = two_ranks_by_hand()
    with open_both(environ, host, client) as (first, second):
        left = threading.Event()

        def leave() -> None:
            leave_failed_join(second, client, 5.0)
            left.set()

        threading.Thread(target=leave).start()
        assert not left.wait(0.3)
        first.close()
        assert left.wait(4.0)


def test_the_next_transfer_of_a_process_meets_under_keys_of_its_own() -> None:
    environ, host, client = two_ranks_by_hand()
    first = open_rendezvous(host, environ, 10.0, call=0)
    publish_address(first, AT_1)
    early = open_rendezvous(client, environ, 10.0, call=1)
    with pytest.raises(RendezvousError, match="published no address"):
        await_address(early, 0.1)
    early.close()
    first.close()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(open_rendezvous, client, environ, 10.0, call=1)  # rank 0 is not there
        time.sleep(0.1)
        second = open_rendezvous(host, environ, 10.0, call=1)
        publish_address(second, AT_2)
        assert await_address(waiting.result(), 5.0) == AT_2
    waiting.result().close()
    second.close()


@contextmanager
def open_both(
    environ: dict[str, str], host: Launch, client: Launch
) -> Iterator[tuple[Rendezvous, Rendezvous]]:
    first, second = (open_rendezvous(launch, environ, 10.0) for launch in (host, client))
    yield first, second
    second.close()
    first.close()


def test_under_slurm_rank_0_serves_the_store_on_the_first_host() -> None:
    environ = SLURM | {"SLURM_STEP_NODELIST": "localhost"}
    port = free_port()
    host = open_rendezvous(Launch("slurm", 0, 2, 0, 2), environ, 10.0, port)
    client = open_rendezvous(Launch("slurm", 1, 2, 1, 2), environ, 10.0, port)
    publish_address(host, AT_2)
    assert await_address(client, 5.0) == AT_2
    client.close()
    host.close()


def test_the_address_where_ranks_meet_is_the_launchers() -> None:
    by_torchrun, by_slurm = detect_launch(TORCHRUN), detect_launch(SLURM)
    assert rendezvous_address(by_torchrun, TORCHRUN, None) == ("10.0.0.1", 29500)
    assert rendezvous_address(by_torchrun, TORCHRUN | {"MASTER_ADDR": "[::1]"}, None)[0] == "::1"
    assert rendezvous_address(by_slurm, SLURM, 4000) == ("gpu07", 4000)
    assert rendezvous_address(by_slurm, SLURM, None) == ("gpu07", slurm_port(SLURM))


def test_the_address_where_ranks_of_mpirun_meet() -> None:
    several = OPEN_MPI | MASTER
    assert rendezvous_address(detect_launch(several), several, None) == ("10.0.0.1", 29500)
    assert rendezvous_address(detect_launch(several), several, 4000) == ("10.0.0.1", 4000)
    here = open_mpi_rank("1", 1, 2)
    assert rendezvous_address(detect_launch(here), here, None) == ("127.0.0.1", mpi_port(here))
    nameless = hydra_rank(1, 2)
    assert rendezvous_address(detect_launch(nameless), nameless, 4000) == ("127.0.0.1", 4000)
    with pytest.raises(RendezvousError, match="PMIX_NAMESPACE") as caught:
        rendezvous_address(detect_launch(nameless), nameless, None)
    assert "--port 29400" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MASTER_ADDR": "node..1"}, "MASTER_ADDR names 'node..1', which is not a host name"),
        ({"MASTER_ADDR": "tcp://node1"}, "MASTER_ADDR names 'tcp://node1'"),
        ({"MASTER_PORT": "29500/tcp"}, "MASTER_PORT is '29500/tcp', not a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, not a port"),
    ],
)
def test_an_invalid_address_is_reported_with_its_variable(
    variables: dict[str, str], sentence: str
) -> None:
    with pytest.raises(RendezvousError, match=sentence):
        rendezvous_address(detect_launch(TORCHRUN), TORCHRUN | variables, None)


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
    meetings = [open_rendezvous(launch, environ, 10.0) for _ in range(2)]
    publish_address(meetings[0], AT_2)
    assert await_address(meetings[1], 5.0) == AT_2
    meetings += [open_rendezvous(launch, environ | {"TORCHELASTIC_RESTART_COUNT": "1"}, 10.0)]
    with pytest.raises(RendezvousError):
        await_address(meetings[2], 0.1)
    for each in meetings:
        each.close(5.0)
    assert agent.check(["nothing"]) is False  # it is not ours to end


def test_the_sender_beside_the_store_is_looked_for_where_the_store_was_found() -> None:
    environ, host, client = two_ranks_by_hand()
    with open_both(environ, host, client) as (first, second):
        assert (first.is_here, second.is_here) == (True, True)
        beside = SenderAddress(("10.0.0.1", "10.1.0.1"), 1, beside_store=True)
        assert hosts_of(beside, second) == ["127.0.0.1", "10.0.0.1", "10.1.0.1"]
        assert hosts_of(SenderAddress(("10.0.0.1",), 1), second) == ["10.0.0.1"]


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
        with pytest.raises(RendezvousError, match=f":{port}: the port is in use") as caught:
            open_rendezvous(Launch("slurm", 0, 2, 0, 2), environ, 1.0, port)
        assert caught.value.hint == "choose another port with --port"


def test_an_unreachable_store_is_one_line_and_no_stack(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with pytest.raises(RendezvousError, match=f"store at 127.0.0.1:{port}: Connection refused"):
        connect_store("127.0.0.1", port, 0.2)
    assert capfd.readouterr().err == ""


def test_a_store_that_listens_but_cannot_be_reached_is_soon_said_to_be_behind_a_firewall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "REACH_LIMIT_S", 0.3)
    started = time.monotonic()
    with full_listener() as port, pytest.raises(RendezvousError) as caught:
        join_served_store("127.0.0.1", port, 300.0)
    assert f"store at 127.0.0.1:{port}" in caught.value.message
    assert "firewall" in (caught.value.hint or "")
    assert time.monotonic() - started < 10


def test_a_store_takes_the_first_free_port_of_a_range() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        held, port = serve_store("127.0.0.1", 10.0, range(taken, min(taken + 50, 65535)))
        assert taken < port < taken + 50
        del held
        with pytest.raises(RendezvousError, match=f"{taken}: all ports are in use") as none:
            serve_store("127.0.0.1", 10.0, range(taken, taken + 1))
    assert none.value.hint == "choose another port with --port-range"


@pytest.fixture
def frozen() -> Iterator[int]:
    """A port where connections are taken but nobody ever answers, as of a stopped process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_frozen_store_does_not_hold_us_beyond_the_deadline(
    frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "GRACE_S", 0.3)
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

    monkeypatch.setattr(stores, "GRACE_S", 0.1)
    monkeypatch.setattr(find_sender, "GRACE_S", 0.1)
    if call is publish_failure:
        call(Hanging(), PackcastError("x"))
    else:
        with pytest.raises(RendezvousError, match="does not answer"):
            call(Hanging(), AT_1)


def test_a_timeout_of_torchs_own_is_one_line(store: Store) -> None:
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RendezvousError, match=r"^it failed: [^\n]*$"):
        stores.answer_in(1.0, "it failed", lambda: store.get("nothing"))
