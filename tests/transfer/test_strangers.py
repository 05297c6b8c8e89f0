"""Each way to launch, under attack from joining to the end; and what it listens on meanwhile."""

from __future__ import annotations

import ipaddress
import random
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_tree
from tests.helpers.commands import (
    TORCHRUN,
    Command,
    Commands,
    HeldDisk,
    eventually,
    free_port,
    rank_environment,
    slurm_task,
    wait_all,
)
from tests.helpers.strangers import Strangers

# Starts a launch of one sender and two workers, who write to copy-1 and copy-2; and tells the port
# of the launcher's store, where that is known.
Start = Callable[[Commands, Path, Path, HeldDisk], tuple[list[Command], int | None]]


def nproc(
    commands: Commands, checkpoint: Path, here: Path, disk: HeldDisk
) -> tuple[list[Command], int | None]:
    argv = ["send", checkpoint, "--out", here / "copy-{rank}", "--nproc", "3"]
    return [commands.packcast(*argv, disk=disk)], None


def torchrun(
    commands: Commands, checkpoint: Path, here: Path, disk: HeldDisk
) -> tuple[list[Command], int | None]:
    options = ["--standalone", "--nproc-per-node", "3", "-m", "packcast"]
    argv = [*TORCHRUN, *options, "send", checkpoint, "--out", here / "copy-{rank}"]
    return [commands.start_warm(argv, disk=disk)], None


def torchrun_split(
    commands: Commands, checkpoint: Path, here: Path, disk: HeldDisk
) -> tuple[list[Command], int | None]:
    port = free_port()
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    send = [*TORCHRUN, *meet, "--node-rank", "0", "--nproc-per-node", "1", "-m", "packcast"]
    recv = [*TORCHRUN, *meet, "--node-rank", "1", "--nproc-per-node", "2", "-m", "packcast"]
    started = [
        commands.start_warm([*send, "send", checkpoint], disk=disk),
        commands.start_warm([*recv, "recv", "--out", here / "copy-{rank}"]),
    ]
    return started, port


def by_hand(
    commands: Commands, checkpoint: Path, here: Path, disk: HeldDisk
) -> tuple[list[Command], int | None]:
    port = free_port()
    argv = ["send", checkpoint, "--out", here / "copy-{rank}"]
    return [
        commands.packcast(*argv, environment=rank_environment(rank, 3, port), disk=disk)
        for rank in range(3)
    ], port


def slurm(
    commands: Commands, checkpoint: Path, here: Path, disk: HeldDisk
) -> tuple[list[Command], int | None]:
    port, job = free_port(), str(random.randrange(10**6))
    argv = ["send", checkpoint, "--out", here / "copy-{rank}", "--port", str(port)]
    return [
        commands.packcast(*argv, environment=slurm_task(job, rank, 3), disk=disk)
        for rank in range(3)
    ], port


def no_launcher(
    commands: Commands, checkpoint: Path, here: Path, disk: HeldDisk
) -> tuple[list[Command], int | None]:
    send = commands.packcast(
        "send", checkpoint, "--workers", "2", "--listen", "127.0.0.1:0", disk=disk
    )
    line = send.read_until(re.compile(r"^ +PACKCAST_TOKEN=(\S+) packcast recv (\S+) ", re.M))
    token = {"PACKCAST_TOKEN": shlex.split(line[1])[0]}
    workers = [
        commands.packcast("recv", line[2], "--out", here / f"copy-{i}", environment=token)
        for i in (1, 2)
    ]
    return [send, *workers], None


STYLES: dict[str, Start] = {
    each.__name__: each for each in (nproc, torchrun, torchrun_split, by_hand, slurm, no_launcher)
}


def have_tried_all(strangers: Strangers, style: str) -> bool:
    kinds = ["first words", "replays", "silent"]
    if style.startswith("torchrun"):  # a store that packcast serves is gone once all have joined
        kinds.append("keys")
    return all(strangers.counts[kind] > 0 for kind in kinds)


@pytest.mark.parametrize("style", STYLES)
def test_strangers_end_nothing_and_find_no_door_but_loopback(
    commands: Commands, large: Path, tmp_path: Path, style: str
) -> None:
    with Strangers(commands.pids) as strangers:
        disk = commands.held_disk()
        launched, port = STYLES[style](commands, large, tmp_path, disk)
        agents = [command.pid for command in launched] if "torchrun" in style else []
        strangers.know(store_port=port, agents=agents)
        commands.await_reached(disk)
        eventually(lambda: have_tried_all(strangers, style), "strangers of every kind", 20)
        disk.release()
        ends = wait_all(launched)
    assert [end.returncode for end in ends] == [0] * len(ends), [end.stderr for end in ends]
    for rank in (1, 2):
        same_tree(large, tmp_path / f"copy-{rank}")
    print(style, dict(strangers.counts), file=sys.stderr)
    of_ranks = strangers.seen_of_ranks
    assert of_ranks
    assert all(ipaddress.ip_address(each.address).is_loopback for each in of_ranks), of_ranks
    assert all("a stranger says" not in end.stderr for end in ends)
