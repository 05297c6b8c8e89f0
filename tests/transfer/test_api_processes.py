"""The library in processes of their own: lost peers, Ctrl-C, groups that are there already.

A failure is raised in a process that lives on and transfers again.
"""

from __future__ import annotations

import inspect
import re
import signal
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

import packcast
from tests.helpers.checkpoints import same_tree
from tests.helpers.commands import (
    Command,
    Commands,
    eventually,
    free_port,
    wait_all,
)

TOKEN = {"PACKCAST_TOKEN": "between us"}
SMALL_RING = ("--buffer-size", "1MiB", "--num-buffers", "2")

RECEIVER = """
import os, sys, threading
import packcast
first, second, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def receive(port, out):
    return packcast.receive_checkpoint(("127.0.0.1", port), out=out, heartbeat_timeout_s=1)

try:
    receive(first, out + "-1")
except packcast.TransferError as error:
    print("raised:", error, file=sys.stderr)
except KeyboardInterrupt:
    print("raised: KeyboardInterrupt", file=sys.stderr)
hidden = [name for name in os.listdir(os.path.dirname(out)) if name.startswith(".")]
print("partial directories:", hidden, file=sys.stderr)
print("transfer threads:", [t.name for t in threading.enumerate() if "transfer" in t.name],
      file=sys.stderr, flush=True)
receive(second, out + "-2")
"""

SENDER = """
import sys
import packcast
checkpoint, *ports = sys.argv[1:]
for port in map(int, ports):
    try:
        report = packcast.send_checkpoint(
            checkpoint, workers=1, listen=("127.0.0.1", port), buffer_size=1 << 20, num_buffers=2
        )
        print("sent", report.num_tensors, file=sys.stderr, flush=True)
    except packcast.TransferError as error:
        print("raised:", error, file=sys.stderr, flush=True)
"""

TRAINER = """
import os, sys
import torch
import torch.distributed as dist
import packcast
checkpoint, out = sys.argv[1:]
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.group.WORLD

def total():
    tensor = torch.tensor([rank + 1.0])
    dist.all_reduce(tensor)
    return tensor.item()

assert total() == 3
for round in range(3):
    if rank == 0:
        packcast.send_checkpoint(checkpoint)
    elif round == 0:
        packcast.receive_checkpoint(out=out)
    elif round == 1:  # the lowest rank that calls this sends; this one is a worker
        packcast.send_checkpoint(checkpoint, verify=checkpoint)
    else:
        names = []
        packcast.receive_checkpoint(on_tensor=lambda name, tensor: names.append(name))
        assert len(names) == 9
    assert dist.group.WORLD is world
    assert total() == 3
del world  # torch aborts a process that still has a gloo group at its end, now and then
dist.destroy_process_group()
print(f"rank {rank} done", file=sys.stderr)
"""

# Weights first, a group of its own at the same address afterwards; `kept` holds what failed.
LATE_TRAINER = """
import datetime, os, sys
import torch
import torch.distributed as dist
import packcast
checkpoint, fails = sys.argv[1], sys.argv[2] == "fails"
rank, kept = int(os.environ["RANK"]), None
try:
    if rank == 0:
        packcast.send_checkpoint(checkpoint)
    else:
        packcast.receive_checkpoint(discard=True)
except packcast.CheckpointError as error:
    kept = error
assert (kept is not None) == fails
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
tensor = torch.tensor([rank + 1.0])
dist.all_reduce(tensor)
assert tensor.item() == 3
dist.destroy_process_group()
print(f"rank {rank} done", file=sys.stderr)
"""


def python_file(folder: Path, program: str) -> Path:
    """The program as a file of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=folder, delete=False) as file:
        file.write(program)
    return Path(file.name)


def sender(commands: Commands, checkpoint: Path, port: int, **options: object) -> Command:
    argv = ("send", checkpoint, "--workers", "1", "--listen", f"127.0.0.1:{port}", *SMALL_RING)
    return commands.packcast(*argv, environment=TOKEN, **options)


@pytest.mark.chaos
@pytest.mark.parametrize("what", ["sender killed", "sender frozen", "interrupted"])
def test_a_transfer_that_breaks_is_raised_and_the_next_one_works(
    commands: Commands, checkpoint: Path, large: Path, tmp_path: Path, what: str
) -> None:
    ports = free_port(), free_port()
    disk = commands.held_disk()
    first = sender(commands, large, ports[0], disk=disk)
    second = sender(commands, checkpoint, ports[1])
    receiving = [python_file(tmp_path, RECEIVER), *map(str, ports), tmp_path / "out"]
    receiver = commands.start_warm([sys.executable, *receiving], TOKEN)
    commands.await_reached(disk)
    eventually(lambda: bool(list(tmp_path.glob(".out-1.packcast-*"))), "it is in the middle")
    if what == "sender killed":
        first.kill()
    elif what == "sender frozen":
        first.freeze()
    else:
        receiver.send_signal(signal.SIGINT)
        ended = first.wait(20)
        assert ended.returncode == 5
        assert "rank 1 (" in ended.error
        assert "interrupted" in ended.error
    says = receiver.read_until(r"raised: (.+)\n(.+)\n(.+)\n", 20)
    if what == "interrupted":
        assert says[1] == "KeyboardInterrupt"
    else:
        assert says[1].startswith("lost the sender, rank 0 (")
        assert f"pid {first.pid}" in says[1]
    assert (says[2], says[3]) == ("partial directories: []", "transfer threads: []")
    for end in wait_all([receiver, second]):
        assert end.returncode == 0, end.stderr
    same_tree(checkpoint, tmp_path / "out-2")
    assert not (tmp_path / "out-1").exists()
    first.kill()


@pytest.mark.chaos
def test_a_sender_that_loses_its_worker_raises_and_sends_again(
    commands: Commands, checkpoint: Path, large: Path, tmp_path: Path
) -> None:
    ports = free_port(), free_port()
    disk = commands.held_disk()
    workers = [
        commands.packcast("recv", f"127.0.0.1:{port}", "--out", tmp_path / out, environment=TOKEN)
        for port, out in zip(ports, ("first", "second"), strict=True)
    ]
    argv = [sys.executable, python_file(tmp_path, SENDER), large, *map(str, ports)]
    sending = commands.start_warm(argv, TOKEN, disk=disk)
    commands.await_reached(disk)
    workers[0].kill()
    said = sending.read_until(r"raised: (.+)", 20)[1]
    assert said.startswith("lost rank 1 (")
    assert f"pid {workers[0].pid}" in said
    disk.release()
    for end in wait_all([sending, workers[1]]):
        assert end.returncode == 0, end.stderr
    assert "sent 9" in sending.stderr
    same_tree(large, tmp_path / "second")


def test_a_default_process_group_is_not_disturbed_and_calls_repeat(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    # The default group's own store is at the port that they are given; rank 0 finds it taken.
    trainer = python_file(tmp_path, TRAINER)
    ranks = commands.start_program(2, trainer, checkpoint, tmp_path / "out")
    for rank, end in enumerate(wait_all(ranks)):
        assert end.returncode == 0, end.stderr
        assert f"rank {rank} done" in end.stderr
    same_tree(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("outcome", ["succeeds", "fails"])
def test_the_launchers_port_is_left_to_the_trainers_own_group(
    commands: Commands, checkpoint: Path, tmp_path: Path, outcome: str
) -> None:
    program = python_file(tmp_path, LATE_TRAINER)
    sent = checkpoint if outcome == "succeeds" else tmp_path / "nothing"
    ranks = commands.start_program(2, program, sent, outcome)
    for rank, end in enumerate(wait_all(ranks)):
        assert end.returncode == 0, end.stderr
        assert f"rank {rank} done" in end.stderr


def example_of(function: object) -> str:
    """The example in a docstring, as it stands there."""
    # Without the function's indentation, which Python 3.13 leaves out by itself.
    lines = re.search(r"\n\n((?:    .*\n|\n)+)", inspect.cleandoc(str(function.__doc__)))
    assert lines is not None
    return textwrap.dedent(lines[1])


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    (tmp_path / "model").mkdir()
    save_file(torch.nn.Linear(5, 3).state_dict(), tmp_path / "model" / "model.safetensors")
    return tmp_path


def test_the_docstrings_examples_run(commands: Commands, model_folder: Path) -> None:
    port = free_port()

    def start(program: str) -> Command:
        assert program.count('("node1", 29400)') == 1
        here = program.replace('("node1", 29400)', f'("127.0.0.1", {port})')
        program = here.replace('"model"', f'"{folder}"')
        return commands.start_warm([sys.executable, python_file(model_folder, program)])

    folder = model_folder / "model"
    show = "import torch\nmodel = torch.nn.Linear(5, 3)\n"
    receive = (
        show + example_of(packcast.receive_checkpoint) + "print(model(torch.ones(5)).tolist())"
    )
    ends = wait_all([start(example_of(packcast.send_checkpoint)), start(receive), start(receive)])
    for end in ends:
        assert end.returncode == 0, end.stderr
    assert "2 tensors at" in ends[0].stdout
    import torch

    torch.manual_seed(1)
    want = torch.nn.Linear(5, 3)(torch.ones(5)).tolist()
    assert ends[1].stdout.strip() == ends[2].stdout.strip() == str(want)
