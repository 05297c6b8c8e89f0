"""What users get wrong that only ranks find out: exit code, what is said, the next step.

The rest of the table is in `tests/cli/test_mistakes.py`.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from packcast.launch.devices import has_gpu_driver
from tests.helpers.checkpoints import sharded
from tests.helpers.commands import TORCHRUN, Commands, Ended, free_port, wait_all
from tests.helpers.disks import small_tmpfs

TWO_RANKS = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "packcast"]
TOKEN = {"PACKCAST_TOKEN": "0123456789abcdef"}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    yield from small_tmpfs(tmp_path / "full", 64 << 10)


def check(end: Ended, code: int, what: str, step: str) -> None:
    """It ended with `code`, and with one error, on the last lines."""
    assert end.returncode == code, end.stderr
    assert re.search(what, end.sentence), end.error
    assert step in end.error


@pytest.mark.parametrize(
    ("options", "code", "what", "step"),
    [
        (["--out", "{desk}/there"], 7, "there exists and is not empty", "replace it with --force"),
        (["--out", "{desk}/file/d"], 7, r"cannot create \S+: \S+ is not a directory", "--out"),
        (["--out", "{desk}/file"], 7, "file is not a directory", "--out names a directory"),
        (["--out", "{desk}/link"], 7, "link is a symbolic link", "give --out "),
        (["--device", "cuda:9"], 4, r"--device cuda:9 is not possible: .* sees no GPU", "gloo"),
        (["--backend", "nccl"], 4, r"--backend nccl is not possible: .* sees no GPU", "gloo"),
        (["--backend", "gloo", "--device", "cuda"], 4, "works on CPU buffers", "leave out one of"),
        (["--readers", "3"], 4, "--readers 3: only 2 ranks ran `send`", "give at most 2"),
    ],
    ids=str,
)
def test_what_the_ranks_cannot_do_is_said_by_each(
    options: list[str],
    code: int,
    what: str,
    step: str,
    commands: Commands,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    if has_gpu_driver() and "no GPU" in what:
        pytest.skip("there are GPUs here")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("there")
    argv = ["send", checkpoint, *(word.format(desk=tmp_path) for word in options)]
    for end in commands.run_ranks(argv, argv):
        check(end, code, what, step)


def test_a_full_disk_is_named_before_any_byte_moves(
    commands: Commands, checkpoint: Path, full_disk: Path
) -> None:
    argv = ["send", checkpoint, "--out", full_disk / "copy"]
    for end in commands.run_ranks(argv, argv):
        check(end, 7, rf"cannot write {full_disk}/copy .* needed, .* free", "free some space")
    assert list(full_disk.iterdir()) == []


def test_two_senders_of_different_checkpoints_are_named(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    other = sharded(tmp_path / "other", 2, 1000)
    for end in commands.run_ranks(["send", checkpoint], ["send", other]):
        check(end, 4, "different checkpoints: rank 0 .* rank 1 ", "give the same CKPT")


def test_a_launch_without_a_sender_says_what_to_run(commands: Commands) -> None:
    for end in commands.run_ranks(["recv", "--discard"], ["recv", "--discard"]):
        check(end, 4, "no rank ran `packcast send`", "one launch must run `packcast send CKPT`")


def test_a_wrong_token_is_said_to_the_worker(commands: Commands, checkpoint: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    send = commands.packcast("send", checkpoint, "--workers", "1", "--listen", address,
                             "--join-timeout", "20s", environment=TOKEN)  # fmt: skip
    send.read_until("packcast recv")
    wrong = {"PACKCAST_TOKEN": "fedcba9876543210"}
    recv = commands.packcast("recv", address, "--discard", environment=wrong)
    check(recv.wait(), 4, "this worker's token is not the sender's", "set the same PACKCAST_TOKEN")


def test_nobody_there_a_port_in_use_and_no_sender(commands: Commands, checkpoint: Path) -> None:
    join = ["--join-timeout", "1s"]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = f"127.0.0.1:{busy.getsockname()[1]}"
        send = ["send", checkpoint, "--workers", "1", *join, "--listen"]
        alone = commands.packcast(*send, f"127.0.0.1:{free_port()}", environment=TOKEN)
        second = commands.packcast(*send, taken, environment=TOKEN)
        recv = commands.packcast("recv", f"127.0.0.1:{free_port()}", "--discard", *join)
        ends = wait_all([alone, second, recv])
    check(ends[0], 4, "1 of 1 worker has not joined within 1", "the others need another address")
    check(ends[1], 4, f"cannot listen on {taken}: .* in use", "choose another port")
    check(ends[2], 4, "no sender at 127.0.0.1:.* connection refused", "is this host itself")


@pytest.mark.parametrize(
    ("options", "said", "cause"),
    [
        (["--buffer-size", "3MB"], "--buffer-size: '3MB' is not a size", "write 64MiB or 1GiB"),
        (["--out", "{full}/copy-{rank}"], "cannot write ", "free some space, or choose another"),
    ],
    ids=["usage", "disk"],
)
def test_under_torchrun_it_is_said_once_and_the_cause_comes_last(
    options: list[str],
    said: str,
    cause: str,
    commands: Commands,
    checkpoint: Path,
    full_disk: Path,
) -> None:
    words = [word.replace("{full}", str(full_disk)) for word in options]
    end = commands.start_warm([*TWO_RANKS, "send", checkpoint, *words]).wait()
    assert end.returncode == 1  # torchrun's own
    assert end.stderr.count("packcast: error: ") == 1, end.stderr
    assert f"packcast: error: {said}" in end.stderr
    _, mark, last = end.stderr.rpartition("Root Cause")
    assert mark
    assert said in last
    assert cause in last


def test_under_torchrun_a_checkpoint_that_only_the_sender_misses_is_the_cause(
    commands: Commands, tmp_path: Path
) -> None:
    end = commands.start_warm([*TWO_RANKS, "send", tmp_path / "none"]).wait()
    assert end.stderr.count(f"packcast: error: {tmp_path / 'none'}: no such file") == 1
    last = end.stderr.rpartition("Root Cause")[2]
    assert f"{tmp_path / 'none'}: no such file or directory" in last
    assert "has no entry none" in last
