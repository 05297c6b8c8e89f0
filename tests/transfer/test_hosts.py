"""Which address: two hosts on networks of several kinds, each of which a transfer has to find."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_tree
from tests.helpers.commands import (
    PACKCAST,
    TIMEOUT_S,
    Command,
    Commands,
    free_port,
    rank_environment,
    slurm_task,
    wait_all,
)
from tests.helpers.hosts import Host, block_all_but, connect, give_default_route, needs_hosts
from tests.helpers.sockets import listening

pytestmark = needs_hosts

TOKEN = {"PACKCAST_TOKEN": "between us"}
TWO_NODES = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
SILENT_NAME_SERVER = """
import socket, sys, time
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
print("listens", file=sys.stderr, flush=True)
time.sleep(600)
"""
# Debian and Ubuntu give a host's own name this address, on the host itself.
OWN_NAME, OTHER_NAME = {"node1": "127.0.1.1"}, {"node1": "10.77.0.1"}


class Two:
    """node1 and node2 on one network without a default route; node1's name is loopback there."""

    def __init__(self, commands: Commands, folder: Path) -> None:
        self.node1 = Host(commands, folder, "node1", OWN_NAME)
        self.node2 = Host(commands, folder, "node2", OTHER_NAME | {"node2": "127.0.1.1"})
        self.cable = connect(self.node1, "10.77.0.1/24", self.node2, "10.77.0.2/24")
        self._commands = commands

    def start(self, host: Host, *argv: str | Path, environment: dict[str, str]) -> Command:
        return self._commands.start_warm([*PACKCAST, *argv], environment, host=host.pid)


@pytest.fixture
def two(commands: Commands, tmp_path: Path) -> Two:
    return Two(commands, tmp_path)


def assert_arrived(checkpoint: Path, out: Path, *commands: Command) -> None:
    for ended in wait_all(commands):
        assert ended.returncode == 0, ended.stderr
    same_tree(checkpoint, out)


def host_said(sender: Command) -> str:
    """Of the line to run on each worker."""
    return sender.read_until(r"packcast recv '?(\S+):\d+'? --out DIR")[1]


@pytest.mark.parametrize("sender", [0, 1])
def test_slurms_nodes_need_no_default_route_and_no_name_that_they_know_of_themselves(
    two: Two, checkpoint: Path, tmp_path: Path, sender: int
) -> None:
    give_default_route(two.node1, "172.31.7.1/24")  # where node2 is not
    roles = [["send", checkpoint], ["recv", "--out", tmp_path / "copy"]]
    tasks = [
        two.start(
            host,
            *roles[rank != sender],
            *("--port", "29411", "--join-timeout", "20s"),
            environment=slurm_task("1", rank, 2) | TWO_NODES | TOKEN,
        )
        for rank, host in enumerate((two.node1, two.node2))
    ]
    assert_arrived(checkpoint, tmp_path / "copy", *tasks)


@pytest.mark.parametrize("sender", [0, 1])
@pytest.mark.parametrize("token", [TOKEN, {}])
def test_in_a_launch_one_address_is_listened_on_and_an_open_one_is_warned_about(
    commands: Commands,
    two: Two,
    large: Path,
    tmp_path: Path,
    sender: int,
    token: dict[str, str],
) -> None:
    give_default_route(two.node1, "172.31.7.1/24")
    disk = commands.held_disk()
    roles = [["send", large], ["recv", "--out", tmp_path / "copy"]]
    ranks = [
        two.start(
            host,
            *roles[rank != sender],
            environment=rank_environment(rank, 2, 29412)
            | {"MASTER_ADDR": "node1"}
            | token
            | (disk.environment() if rank == sender else {}),
        )
        for rank, host in enumerate((two.node1, two.node2))
    ]
    commands.await_reached(disk)
    addresses = {each.address for each in listening([ranks[sender].pid])}
    assert addresses == {f"10.77.0.{sender + 1}"}
    disk.release()
    assert_arrived(large, tmp_path / "copy", *ranks)
    assert ("warning: this launch has no token" in ranks[0].stderr) == (not token)


def test_different_tokens_are_named_while_the_ranks_wait(two: Two, checkpoint: Path) -> None:
    port = free_port()
    ranks = [
        two.start(
            host,
            *command,
            environment=rank_environment(rank, 2, port)
            | {"MASTER_ADDR": "10.77.0.1", "LOCAL_RANK": "0", "PACKCAST_TOKEN": f"of rank {rank}"},
        )
        for rank, (host, command) in enumerate(
            [(two.node1, ("send", checkpoint)), (two.node2, ("recv", "--discard"))]
        )
    ]
    ranks[1].read_until("rank 0 is there, but not with the same token as this rank: set the same")


def test_a_slurm_step_on_several_hosts_needs_a_token(commands: Commands, checkpoint: Path) -> None:
    task = slurm_task("1", 0, 2) | TWO_NODES
    end = commands.packcast("send", checkpoint, environment=task).wait()
    assert end.returncode == 2
    assert "a Slurm step on several hosts needs a token" in end.error
    assert "export PACKCAST_TOKEN=" in end.error


def test_a_name_that_is_loopback_on_its_own_host_is_listened_for_on_every_address(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    port = free_port()
    send = two.start(
        two.node1,
        *("send", checkpoint, "--workers", "1", "--listen", f"node1:{port}"),
        environment=TOKEN,
    )
    assert host_said(send) == "10.77.0.1"
    assert "node1 resolves to 127.0.1.1 here, which other hosts cannot reach" in send.stderr
    recv = two.start(
        two.node2, "recv", f"node1:{port}", "--out", tmp_path / "copy", environment=TOKEN
    )
    assert_arrived(checkpoint, tmp_path / "copy", send, recv)


def test_who_listens_everywhere_shows_addresses_and_uses_the_one_at_which_a_worker_comes(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    give_default_route(two.node1, "172.31.7.1/24")
    send = two.start(
        two.node1,
        *("send", checkpoint, "--workers", "1", "--listen", "0.0.0.0:29413"),
        environment=TOKEN,
    )
    assert host_said(send) == "172.31.7.1"
    send.read_until("another address of this host: 10.77.0.1")
    recv = two.start(
        two.node2, "recv", "10.77.0.1:29413", "--out", tmp_path / "copy", environment=TOKEN
    )
    assert_arrived(checkpoint, tmp_path / "copy", send, recv)


def test_link_local_addresses_work_with_each_hosts_own_interface(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    for host in (two.node1, two.node2):  # of IPv6 link-local ones are left
        host.ip("-4", "address", "flush", "dev", two.cable)
    two.node2.ip("link", "set", two.cable, "down")
    two.node2.ip("link", "set", two.cable, "name", "other0")
    two.node2.ip("link", "set", "other0", "up")
    found = re.search(r"fe80::[0-9a-f:]+", two.node1.ip("-6", "address", "show", "dev", two.cable))
    assert found
    send = two.start(
        two.node1,
        *("send", checkpoint, "--workers", "1", "--listen", f"[{found[0]}%{two.cable}]:29414"),
        environment=TOKEN,
    )
    assert host_said(send) == f"[{found[0]}%{two.cable}]"
    recv = two.start(
        two.node2,
        *("recv", f"[{found[0]}%other0]:29414", "--out", tmp_path / "copy"),
        environment=TOKEN,
    )
    assert_arrived(checkpoint, tmp_path / "copy", send, recv)


def test_a_worker_waits_for_a_name_that_does_not_resolve_yet(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    recv = two.start(
        two.node2,
        *("recv", "sender-0.svc:29415", "--out", tmp_path / "copy", "--join-timeout", "30s"),
        environment=TOKEN,
    )
    recv.read_until(r"waiting for the sender at sender-0.svc:29415 \(its name cannot be resolved")
    send = two.start(
        two.node1,
        *("send", checkpoint, "--workers", "1", "--listen", "sender-0.svc:29415"),
        environment=TOKEN,
    )
    send.read_until("waiting until sender-0.svc resolves to an address")
    two.node1.know(OWN_NAME | {"sender-0.svc": "10.77.0.1"})
    assert host_said(send) == "10.77.0.1"
    two.node2.know(OTHER_NAME | {"sender-0.svc": "10.77.0.1"})
    assert_arrived(checkpoint, tmp_path / "copy", send, recv)


@pytest.mark.parametrize("launch", ["none", "torchrun"])
def test_a_name_server_that_never_answers_is_named_at_the_join_limit(
    two: Two, commands: Commands, tmp_path: Path, launch: str
) -> None:
    # Longer than a test may last: neither the look-up's end is waited for, nor its thread's.
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    silent = commands.start([*two.node2.inside(sys.executable, "-c", SILENT_NAME_SERVER)])
    silent.read_until("listens")
    name, address = "sender-0.svc", ["sender-0.svc:29416"]
    environment = TOKEN
    if launch == "torchrun":
        environment = TOKEN | rank_environment(1, 2, 29416) | {"MASTER_ADDR": name}
        address = []
    recv = two.start(
        two.node2,
        *("recv", *address, "--out", tmp_path / "copy", "--join-timeout", "5s"),
        environment=environment,
    )
    ended = recv.wait()
    assert ended.returncode == 4
    if launch == "none":
        assert f"sender at {name}:29416 (no name server has answered); waits up" in ended.stderr
    where = f"no sender at {name}:29416 within 5" if address else f"the store at {name}:29416"
    assert where in ended.sentence
    assert "its name cannot be resolved: no name server has answered" in ended.sentence
    assert "give the address instead of the name" in ended.error


def test_doctor_names_a_name_server_that_never_answers(
    two: Two, commands: Commands, tmp_path: Path
) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    silent = commands.start([*two.node2.inside(sys.executable, "-c", SILENT_NAME_SERVER)])
    silent.read_until("listens")
    doctor = two.start(
        two.node2, *("doctor", "--no-test", "--reach", "sender-0.svc:29416"), environment={}
    )
    ended = doctor.wait()
    assert "sender-0.svc has no address: no name server has answered" in ended.stdout
    assert ended.returncode == 4


def test_a_loopback_address_for_another_host_is_an_error_that_says_so_on_both(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    limit = ("--join-timeout", "4s")
    send = two.start(
        two.node1,
        *("send", checkpoint, "--workers", "1", "--listen", "localhost:29416", *limit),
        environment=TOKEN,
    )
    started = time.monotonic()
    recv = two.start(
        two.node2,
        *("recv", "127.0.0.1:29416", "--out", tmp_path / "copy", *limit),
        environment=TOKEN,
    )
    sent, received = wait_all([send, recv])
    assert (sent.returncode, received.returncode) == (4, 4)
    assert "this listens on 127.0.0.1, where only ranks of this host reach it" in sent.error
    assert "127.0.0.1 is this host itself" in received.error
    assert time.monotonic() - started < TIMEOUT_S


def start_through_firewall(two: Two, checkpoint: Path, out: Path) -> tuple[Command, Command]:
    send = two.start(
        two.node1,
        *("send", checkpoint, "--workers", "1", "--listen", "10.77.0.1:29417"),
        *("--port-range", "29418-29419"),
        environment=TOKEN,
    )
    return send, two.start(two.node2, "recv", "10.77.0.1:29417", "--out", out, environment=TOKEN)


def test_a_firewall_that_passes_the_ports_chosen_passes_a_transfer(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    block_all_but(two.node1, two.cable, range(29417, 29431))
    two.node1.take_ports(range(29420, 29431))  # for gloo
    send, recv = start_through_firewall(two, checkpoint, tmp_path / "copy")
    assert_arrived(checkpoint, tmp_path / "copy", send, recv)


def test_the_stores_port_is_named_within_seconds_where_a_firewall_blocks_it(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    block_all_but(two.node1, two.cable, range(29417, 29418))
    started = time.monotonic()
    for ended in wait_all(start_through_firewall(two, checkpoint, tmp_path / "copy")):
        assert ended.returncode == 4
        assert "cannot reach the store at 10.77.0.1:29418" in ended.error
        assert "does a firewall block that port?" in ended.error
    assert time.monotonic() - started < TIMEOUT_S


def test_a_launchers_port_that_a_firewall_blocks_is_named_while_a_rank_waits(
    two: Two, checkpoint: Path, tmp_path: Path
) -> None:
    block_all_but(two.node1, two.cable, range(29430, 29431))
    ranks = [
        two.start(
            host,
            *("send", checkpoint, "--out", tmp_path / "copy"),
            environment=rank_environment(rank, 2, 29412)
            | {"LOCAL_RANK": "0", "MASTER_ADDR": "10.77.0.1"}
            | TOKEN,
        )
        for rank, host in enumerate((two.node1, two.node2))
    ]
    line = r"waiting for the launcher's store at 10.77.0.1:29412 \(no answer: .* a firewall blocks"
    ranks[1].read_until(line)


def test_ipv6_alone_is_enough(two: Two, checkpoint: Path, tmp_path: Path) -> None:
    for host, address in ((two.node1, "fd00:77::1/64"), (two.node2, "fd00:77::2/64")):
        host.ip("-4", "address", "flush", "dev", two.cable)
        host.ip("address", "add", address, "dev", two.cable)
    send = two.start(
        two.node1,
        *("send", checkpoint, "--workers", "1", "--listen", "[fd00:77::1]:0"),
        *("--port-range", "29431-29440"),
        environment=TOKEN,
    )
    assert host_said(send) == "[fd00:77::1]"
    recv = two.start(
        two.node2, "recv", "[fd00:77::1]:29431", "--out", tmp_path / "copy", environment=TOKEN
    )
    assert_arrived(checkpoint, tmp_path / "copy", send, recv)
