"""Whole transfers along a chain of four ranks: every reader's share, and ends in mid chain."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_tree
from tests.helpers.commands import Commands, free_port, rank_environment, wait_all

pytestmark = pytest.mark.usefixtures("kind_of_hops")

# Rank 2 fails once, in mid chain.
PROGRAM = """
import gc, os, sys, time
import packcast
from packcast.errors import DestinationError
from packcast.packed import unfinished
from packcast.packed.chain import Chain
from packcast.packed.ring import Ring

checkpoint, out = sys.argv[1:]
rank, carry, carried = int(os.environ["RANK"]), Chain.carry, []

def carry_until_full(self, memory, root):
    carried.append(root)
    if rank == 2 and len(carried) == 6:
        raise DestinationError("the disk is full")
    return carry(self, memory, root)

def transfer(name):
    packcast.send_checkpoint(
        checkpoint, out=f"{out}/{name}-{{rank}}", readers=2, buffer_size=1 << 20, num_buffers=2
    )

def say_what_is_left():
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread that was joined takes a moment to end
    threads = [open(f"/proc/self/task/{id}/comm").read() for id in os.listdir("/proc/self/task")]
    rings = [each for each in gc.get_objects() if type(each) is Ring]
    threads.remove("python\\n")
    print("left:", threads, len(rings), len(unfinished._kept), file=sys.stderr)

gc.disable()
Chain.carry = carry_until_full
try:
    transfer("first")
except DestinationError as error:
    print("raised:", error, file=sys.stderr)
    kept = error
say_what_is_left()
transfer("second")
say_what_is_left()
"""


@pytest.mark.parametrize(("readers", "num_buffers"), [("all", 1), ("2", 3)])
def test_every_worker_has_the_bytes_of_all_readers(
    commands: Commands, large: Path, tmp_path: Path, readers: str, num_buffers: int
) -> None:
    sending = (
        *("send", large, "--out", tmp_path / "out-{rank}", "--readers", readers),
        *("--buffer-size", "2MiB", "--num-buffers", str(num_buffers)),
    )
    for end in commands.run_ranks(*[sending] * 4):
        assert end.returncode == 0, end.stderr
    for rank in (1, 2, 3):
        same_tree(large, tmp_path / f"out-{rank}")


def test_after_a_failure_in_mid_chain_nothing_is_left_and_the_next_transfer_works(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (tmp_path / "out").mkdir()
    for rank, end in enumerate(
        wait_all(commands.start_program(4, program, large, tmp_path / "out"))
    ):
        assert end.returncode == 0, end.stderr
        raised, *left = end.stderr.splitlines()
        assert raised.endswith("the disk is full")
        assert raised.startswith("raised: the disk" if rank == 2 else "raised: rank 2 (")
        # Threads, buffers, collectives: without the collector of cycles, and with the error kept.
        assert left == ["left: [] 0 0"] * 2
    assert sorted(os.listdir(tmp_path / "out")) == ["second-1", "second-2", "second-3"]
    for rank in (1, 2, 3):
        same_tree(large, tmp_path / "out" / f"second-{rank}")


@pytest.mark.chaos
@pytest.mark.parametrize("frozen", [0, 2])
def test_a_rank_that_freezes_while_the_chain_is_connected_is_lost_within_its_heartbeat_timeout(
    commands: Commands, checkpoint: Path, tmp_path: Path, frozen: int
) -> None:
    freezing = tmp_path / "freezing.py"
    freezing.write_text(
        textwrap.dedent("""
            import os, signal
            import packcast.__main__, packcast.transfer.group
            def freeze(*args, **options):
                os.kill(os.getpid(), signal.SIGSTOP)
            packcast.transfer.group.open_hops = freeze
            packcast.__main__.main()
        """)
    )
    port = free_port()
    argv = ("send", checkpoint, "--heartbeat-timeout", "1s", "--out", tmp_path / "out-{rank}")
    ranks = [
        commands.start_warm(
            [sys.executable, *((freezing,) if rank == frozen else ("-m", "packcast")), *argv],
            rank_environment(rank, 4, port),
        )
        for rank in range(4)
    ]
    who = "the sender, rank 0" if frozen == 0 else f"rank {frozen}"
    for end in wait_all([ranks[rank] for rank in range(4) if rank != frozen], 20.0):
        assert end.returncode == 5, end.stderr
        assert end.sentence.startswith(f"lost {who} (")
        assert "no sign of life for 1" in end.sentence
