"""Processes that die, freeze or are told to stop in the middle: what the others say, do and leave.

The sender's disk holds still after 8 of 70 MiB, so that the middle is a place and no moment.
Started from the middle, every end has to come within seconds.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from packcast.units import MIB
from tests.helpers.checkpoints import same_tree, sharded
from tests.helpers.commands import (
    TORCHRUN,
    Command,
    Commands,
    Ended,
    HeldDisk,
    eventually,
    free_port,
    rank_environment,
    wait_all,
)

pytestmark = pytest.mark.chaos

# From the cause to the last survivor's end; told over the control channel, it takes less than one.
PROMPT_S = 10.0
SMALL_RING = ("--buffer-size", "1MiB", "--num-buffers", "2")
PATIENT = ("--heartbeat-timeout", "5min")
IMPATIENT = ("--heartbeat-timeout", "1s")
# Where the disk stops, give or take a ring.
POSITION = r"model-0000\d-of-00003.safetensors, [\d.]+ .iB of 23.4 MiB"


def start_held(
    commands: Commands,
    large: Path,
    outs: Sequence[Path],
    *options: str,
    sender: Sequence[str] = (),
    worker: Sequence[str] = (),
) -> tuple[list[Command], HeldDisk]:
    """A sender and a worker for each of `outs`, in the middle of the transfer."""
    disk = commands.held_disk()
    workers: list[Sequence[str | Path]] = [
        ("recv", "--out", out, *options, *worker) for out in outs
    ]
    ranks = commands.start_ranks(
        ("send", large, *SMALL_RING, *options, *sender), *workers, disks={0: disk}
    )
    commands.await_reached(disk)
    for out in outs:
        assert list(out.parent.glob(f".{out.name}.packcast-*")), "it is in the middle"
    return ranks, disk


def hang_in_a_collective(disk: HeldDisk, sender: Command, frozen: Command) -> None:
    """With a worker frozen and the disk free, the others wait inside gloo."""
    frozen.freeze()
    disk.release()
    # The ring and the sockets' buffers are full within moments; then the sender reads no more.
    counted = [num_read(sender)]

    def is_still() -> bool:
        time.sleep(0.3)
        counted.append(num_read(sender))
        return counted[-1] == counted[-2]

    eventually(is_still, "the sender to hang")
    assert sender.process.poll() is None


def num_read(command: Command) -> str:
    """The bytes that the process has read from files so far."""
    return Path(f"/proc/{command.pid}/io").read_text().splitlines()[0]


def assert_lost(end: Ended, lost: Command, who: str, where: str = "model") -> None:
    """The sentence of a loss: who, where, and how far all was."""
    assert end.returncode == 5, end.stderr
    assert f"lost {who} (" in end.sentence
    assert f"pid {lost.pid}) at {where}" in end.sentence


def test_a_killed_worker_ends_the_others_with_its_name_and_old_copies_stay(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    old = sharded(tmp_path / "out", 3, 1000, seed=7)
    same = sharded(tmp_path / "same", 3, 1000, seed=7)
    dead_out = tmp_path / "dead" / "out"
    ranks, _ = start_held(commands, large, [old, dead_out], worker=["--force"])
    ranks[2].kill()
    sender, worker = wait_all(ranks[:2], PROMPT_S)
    for end in (sender, worker):
        assert_lost(end, ranks[2], "rank 2")
    assert sender.sentence == worker.sentence
    same_tree(same, old)
    # What a killed process leaves is hidden and its own.
    assert sorted(os.listdir(tmp_path)) == ["dead", "out", "same"]
    assert not dead_out.exists()


def test_a_worker_killed_while_all_wait_in_a_collective(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    ranks, disk = start_held(commands, large, [tmp_path / "a", tmp_path / "b"], *PATIENT)
    hang_in_a_collective(disk, ranks[0], ranks[1])
    ranks[2].kill()
    sender = ranks[0].wait(PROMPT_S)
    assert_lost(sender, ranks[2], "rank 2")
    # Told while it was frozen, the other one says the same as soon as it goes on.
    ranks[1].thaw()
    worker = ranks[1].wait(PROMPT_S)
    assert worker.returncode == 5
    assert worker.sentence == sender.sentence
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".b.packcast-")


def test_a_frozen_worker_is_lost_within_its_heartbeat_timeout(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    ranks, disk = start_held(commands, large, [tmp_path / "a", tmp_path / "b"], *IMPATIENT)
    hang_in_a_collective(disk, ranks[0], ranks[2])
    sender, worker = wait_all(ranks[:2], PROMPT_S)
    for end in (sender, worker):
        assert_lost(end, ranks[2], "rank 2")
        assert "no sign of life for 1" in end.sentence
    assert sender.sentence == worker.sentence
    ranks[2].thaw()
    late = ranks[2].wait(PROMPT_S)
    assert late.returncode == 5
    assert late.error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", ["killed", "frozen"])
@pytest.mark.parametrize("world_size", [3, 4])
def test_a_worker_that_dies_or_freezes_while_it_starts_is_named_at_once(
    commands: Commands, large: Path, tmp_path: Path, world_size: int, how: str
) -> None:
    """While another is still to come; and where none is, wherever that is in starting."""
    limit = IMPATIENT if how == "frozen" else PATIENT
    workers = [("recv", "--out", tmp_path / out, *limit) for out in "ab"]
    ranks = commands.start_ranks(
        ("send", large, *SMALL_RING, *limit), *workers, world_size=world_size
    )
    ranks[0].read_until(f"joined, 2 of {world_size - 1}")
    if how == "killed":
        ranks[2].kill()
    else:
        ranks[2].freeze()
    ends = wait_all(ranks[:2], PROMPT_S)
    for end in ends:
        assert end.returncode == 5
        assert "lost rank 2 (" in end.sentence
        assert f"pid {ranks[2].pid})" in end.sentence
        assert ("no sign of life for 1" in end.sentence) == (how == "frozen")
    assert ends[0].sentence == ends[1].sentence
    if how == "frozen":
        ranks[2].thaw()
        assert ranks[2].wait(PROMPT_S).returncode == 5
        assert os.listdir(tmp_path) == []


def test_a_worker_that_freezes_as_it_publishes_is_named_and_the_others_are_done(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    disk = commands.held_disk(None)
    ranks = commands.start_ranks(
        ("send", large, *IMPATIENT),
        *[("recv", "--out", tmp_path / out, *IMPATIENT) for out in "ab"],
        disks={2: disk},
    )
    commands.await_reached(disk)
    ranks[2].freeze()
    sender, worker = wait_all(ranks[:2], PROMPT_S)
    assert_lost(sender, ranks[2], "rank 2", "the end")
    assert sender.sentence.endswith("no sign of life for 1 s; complete on rank 1")
    assert worker.returncode == 0, worker.stderr
    same_tree(large, tmp_path / "a")


def test_a_slow_worker_is_no_stall_however_long_the_others_wait_for_it(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    impatient = ("--stall-timeout", "1s")
    slow = {"SLOW_DISK": str(25 * MIB), "PACKCAST_POOL": "python"}
    port = free_port()
    argvs: list[Sequence[str | Path]] = [
        ("send", large, *impatient),
        ("recv", "--out", tmp_path / "fast", *impatient),
        ("recv", "--out", tmp_path / "slow", *impatient),
    ]
    ranks = [
        commands.packcast(
            *argv, environment=rank_environment(rank, 3, port) | (slow if rank == 2 else {})
        )
        for rank, argv in enumerate(argvs)
    ]
    begin = time.monotonic()
    ends = wait_all(ranks)
    assert [end.returncode for end in ends] == [0, 0, 0], [end.stderr for end in ends]
    assert time.monotonic() - begin > 2.5, "it was not slow"
    same_tree(large, tmp_path / "slow")


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_without_the_sender_every_worker_ends_with_its_name(
    commands: Commands, large: Path, tmp_path: Path, how: str
) -> None:
    limit = IMPATIENT if how == "frozen" else PATIENT
    ranks, _ = start_held(commands, large, [tmp_path / "a", tmp_path / "b"], *limit)
    if how == "killed":
        ranks[0].kill()
    else:
        ranks[0].freeze()
    for end in wait_all(ranks[1:], PROMPT_S):
        assert_lost(end, ranks[0], "the sender, rank 0")
        assert ("no sign of life for 1" in end.sentence) == (how == "frozen")
    assert os.listdir(tmp_path) == []
    if how == "frozen":
        ranks[0].thaw()
        assert ranks[0].wait(PROMPT_S).returncode == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("interrupted", "frozen", "other"), [(0, 2, 1), (2, 1, 0)])
def test_an_interrupted_rank_says_so_and_the_others_name_it(
    commands: Commands,
    large: Path,
    tmp_path: Path,
    number: signal.Signals,
    interrupted: int,
    frozen: int,
    other: int,
) -> None:
    ranks, disk = start_held(commands, large, [tmp_path / "a", tmp_path / "b"], *PATIENT)
    hang_in_a_collective(disk, ranks[0], ranks[frozen])
    ranks[interrupted].send_signal(number)
    own, others = wait_all([ranks[interrupted], ranks[other]], PROMPT_S)
    assert own.returncode == 128 + number
    assert own.sentence == f"interrupted by {number.name}"
    assert others.returncode == 5
    assert f"pid {ranks[interrupted].pid})" in others.sentence
    assert f"interrupted by {number.name}" in others.sentence
    ranks[frozen].thaw()
    thawed = ranks[frozen].wait(PROMPT_S)
    assert (thawed.returncode, thawed.sentence) == (5, others.sentence)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("side", ["sender", "worker"])
def test_a_disk_that_hangs_ends_all_at_the_first_stall_timeout(
    commands: Commands, large: Path, tmp_path: Path, side: str
) -> None:
    limit = {side: ["--stall-timeout", "2s"]}
    ranks, _ = start_held(commands, large, [tmp_path / "a"], **limit)
    sender, worker = wait_all(ranks, PROMPT_S)
    for end in (sender, worker):
        assert end.returncode == 5
        assert "no byte has moved for 2" in end.sentence
    assert "--stall-timeout" in (sender if side == "sender" else worker).error
    if side == "worker":
        assert sender.sentence.startswith("rank 1 (")
    assert os.listdir(tmp_path) == []


def test_a_killed_reader_is_lost_as_any_worker(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    disk = commands.held_disk(28 * MIB)  # it reads 16 MiB of samples before
    sending = ("send", large, *SMALL_RING, "--readers", "2")
    ranks = commands.start_ranks(
        sending, sending, ("recv", "--out", tmp_path / "out"), disks={0: disk}
    )
    commands.await_reached(disk)
    ranks[1].kill()
    for end in wait_all([ranks[0], ranks[2]], PROMPT_S):
        assert_lost(end, ranks[1], "rank 1")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("victim", [0, 2])
def test_after_the_point_of_no_return_a_death_does_not_undo_what_others_published(
    commands: Commands, large: Path, tmp_path: Path, victim: int
) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    disk = commands.held_disk(None)
    ranks = commands.start_ranks(
        ("send", large), *[("recv", "--out", out) for out in outs], disks={2: disk}
    )
    commands.await_reached(disk)
    eventually(outs[0].is_dir, "the other worker's copy")
    ranks[victim].kill()
    ranks[victim].process.wait()
    time.sleep(0.5)  # both for the one that has published and for the one that has not yet
    disk.release()
    survivors = [ranks[rank] for rank in (0, 1, 2) if rank != victim]
    ends = wait_all(survivors, PROMPT_S)
    same_tree(large, outs[0])
    if victim == 2:
        sender, worker = ends
        assert_lost(sender, ranks[2], "rank 2", "the end")
        assert sender.sentence.endswith("; complete on rank 1")
        assert worker.returncode == 0, worker.stderr
        assert not outs[1].exists()
        return
    for end, rank in zip(ends, (1, 2), strict=True):
        assert end.returncode == 0, end.stderr
        assert "lost the sender, rank 0 (" in end.stderr
        assert f"pid {ranks[0].pid})" in end.stderr
        assert "packcast: error" not in end.stderr
        same_tree(large, outs[rank - 1])
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def start_launched(
    commands: Commands, large: Path, tmp_path: Path, *launcher: str, options: Sequence[str] = ()
) -> Command:
    """Three ranks of a launcher, in the middle of the transfer."""
    disk = commands.held_disk()
    argv: list[str | Path] = [
        "send",
        large,
        "--out",
        tmp_path / "out-{rank}",
        *SMALL_RING,
        *options,
    ]
    launched = (
        commands.start_warm([*launcher, *argv], disk=disk)
        if launcher
        else commands.packcast(*argv, "--nproc", "3", disk=disk)
    )
    commands.await_reached(disk)
    eventually(lambda: len(list(tmp_path.glob(".out-*"))) == 2, "both partial directories")
    return launched


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "packcast: error: " in line]


def test_under_nproc_a_killed_worker_is_named_and_no_rank_is_left(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    launched = start_launched(commands, large, tmp_path)
    victim = commands.pid_of_rank(2)
    os.kill(victim, signal.SIGKILL)
    end = launched.wait(PROMPT_S)
    assert end.returncode == 5
    assert "Traceback" not in end.stderr
    errors = errors_in(end.stderr)
    assert errors
    assert all(f"pid {victim})" in error for error in errors), end.stderr
    assert commands.alive() == []
    # The victim could not clean up: its launcher does.
    removed = rf"out-2\.packcast-\w+ \(.*\) was left behind by pid {victim} on \S+: removed"
    assert re.search(removed, end.stderr), end.stderr
    assert os.listdir(tmp_path) == []


# Before all others where that is allowed, or a rank that is woken has moments to clean up.
FREEZER = """
import os, signal, sys
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except PermissionError:
    pass
os.kill(int(sys.argv[1]), signal.SIGSTOP)
print("frozen", flush=True)
while True:
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
"""


@contextmanager
def kept_frozen(pid: int) -> Iterator[None]:
    """Whoever wakes it."""
    argv = [sys.executable, "-S", "-c", FREEZER, str(pid)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as freezer:
        assert freezer.stdout is not None
        assert freezer.stdout.readline() == b"frozen\n"
        try:
            yield
        finally:
            freezer.kill()


def test_under_nproc_a_frozen_rank_is_woken_to_clean_up_once_the_others_have_ended(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    launched = start_launched(commands, large, tmp_path, options=IMPATIENT)
    victim = commands.pid_of_rank(2)
    os.kill(victim, signal.SIGSTOP)
    started = time.monotonic()
    end = launched.wait(PROMPT_S)
    print(f"ended {time.monotonic() - started:.1f} s after the freeze")
    assert end.returncode == 5
    errors = errors_in(end.stderr)
    assert errors
    assert all(f"pid {victim})" in error for error in errors), end.stderr
    assert commands.alive() == []
    assert os.listdir(tmp_path) == []


def test_under_nproc_a_third_signal_names_what_a_frozen_rank_leaves(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    launched = start_launched(commands, large, tmp_path)
    victim = commands.pid_of_rank(2)
    with kept_frozen(victim):
        launched.send_signal(signal.SIGINT)
        eventually(lambda: len(os.listdir(tmp_path)) == 1, "the clean-up of those that can")
        launched.send_signal(signal.SIGINT)
        launched.read_until("still cleaning up, at most 20 s; one more signal kills the ranks")
        launched.send_signal(signal.SIGINT)
        end = launched.wait(PROMPT_S)
    assert end.returncode == 130, end.stderr
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out-2.packcast-")
    assert f"{tmp_path / left} (" in end.stderr
    assert f"left behind by pid {victim} on " in end.stderr
    assert f"`packcast clean --yes {tmp_path}` removes it" in end.stderr
    cleaned = commands.packcast("clean", "--yes", tmp_path).wait()
    assert cleaned.returncode == 0, cleaned.stderr
    assert os.listdir(tmp_path) == []


def test_the_next_run_removes_what_a_killed_one_left(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    launched = start_launched(commands, large, tmp_path)
    pids = [commands.pid_of_rank(rank) for rank in (1, 2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # or they would clean up when their launcher is gone
    launched.kill()
    launched.process.wait()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: commands.alive() == [], "the ranks' end", PROMPT_S)
    assert len(list(tmp_path.glob(".out-*.packcast-*"))) == 2
    again = commands.packcast("send", large, "--out", tmp_path / "out-{rank}", "--nproc", "3")
    end = again.wait()
    assert end.returncode == 0, end.stderr
    assert all(f"was left behind by pid {pid} on " in end.stderr for pid in pids), end.stderr
    assert sorted(os.listdir(tmp_path)) == ["out-1", "out-2"]
    same_tree(large, tmp_path / "out-1")


@pytest.mark.parametrize(
    ("numbers", "codes"),
    [
        ([signal.SIGINT], {130}),
        ([signal.SIGTERM], {143}),
        ([signal.SIGINT, signal.SIGTERM], {130, 143}),
    ],
)
def test_under_nproc_signals_end_all_and_leave_nothing(
    commands: Commands,
    large: Path,
    tmp_path: Path,
    numbers: list[signal.Signals],
    codes: set[int],
) -> None:
    launched = start_launched(commands, large, tmp_path)
    for number in numbers:
        launched.send_signal(number)
    end = launched.wait(PROMPT_S)
    assert end.returncode in codes, end.stderr
    assert "Traceback" not in end.stderr
    assert commands.alive() == []
    assert os.listdir(tmp_path) == []


def test_ranks_die_with_a_killed_nproc(commands: Commands, large: Path, tmp_path: Path) -> None:
    launched = start_launched(commands, large, tmp_path)
    launched.kill()
    launched.process.wait()
    eventually(lambda: commands.alive() == [], "the ranks' end", PROMPT_S)
    assert os.listdir(tmp_path) == []


def test_torchrun_blames_the_worker_that_was_killed(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    launched = start_launched(
        *(commands, large, tmp_path, *TORCHRUN),
        *("--standalone", "--nproc-per-node", "3", "-m", "packcast"),
    )
    victim = commands.pid_of_rank(1)
    os.kill(victim, signal.SIGKILL)
    end = launched.wait(2 * PROMPT_S)
    assert end.returncode == 1
    errors = errors_in(end.stderr)
    assert errors
    assert all(f"pid {victim})" in error for error in errors), end.stderr
    cause = end.stderr.partition("Root Cause")[2]
    assert f"pid {victim})" in cause or f"(pid: {victim})" in cause
    assert commands.alive() == []
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out-1.packcast-")
