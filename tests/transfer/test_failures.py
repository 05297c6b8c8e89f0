"""Everything that can be wrong with a run: exit code, sentence, next step, what is left.

Real processes over gloo, each of which costs seconds: hence few ranks, and few launches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from packcast.launch.devices import visible_gpus
from packcast.units import MIB
from tests.helpers.checkpoints import same_tree, sharded, write_safetensors
from tests.helpers.commands import (
    TIMEOUT_S,
    TORCHRUN,
    Commands,
    Ended,
    free_port,
    rank_environment,
    wait_all,
)
from tests.helpers.disks import small_tmpfs

PACKCAST = (sys.executable, "-m", "packcast")
SHARD = "model-00002-of-00003.safetensors"
SMALL_RING = ("--buffer-size", "1MiB", "--num-buffers", "2")


def codes(ends: Sequence[Ended]) -> list[int]:
    return [end.returncode for end in ends]


def one_sentence(ends: Sequence[Ended]) -> str:
    """The sentence that all ranks end with, hint and all."""
    (error,) = {end.error for end in ends}
    return error


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden or not: files' bytes, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def ruin_not_there(folder: Path) -> tuple[Path, str]:
    return folder / "nowhere", "nowhere"


def ruin_not_safetensors(folder: Path) -> tuple[Path, str]:
    (folder / SHARD).write_bytes(b"PK\x03\x04" + bytes(1000))
    return folder / SHARD, SHARD


def ruin_truncated(folder: Path) -> tuple[Path, str]:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)
    return folder, SHARD


def ruin_missing_shard(folder: Path) -> tuple[Path, str]:
    (folder / SHARD).unlink()
    return folder, SHARD


@pytest.mark.parametrize(
    "ruin", [ruin_not_there, ruin_not_safetensors, ruin_truncated, ruin_missing_shard]
)
def test_a_bad_checkpoint_ends_every_rank_with_one_sentence(
    commands: Commands,
    checkpoint: Path,
    tmp_path: Path,
    ruin: Callable[[Path], tuple[Path, str]],
) -> None:
    bad, named = ruin(Path(shutil.copytree(checkpoint, tmp_path / "bad")))
    argv = ("send", bad, "--out", tmp_path / "out-{rank}")
    ends = commands.run_ranks(argv, argv, timeout_s=20)  # far below the join timeout
    assert codes(ends) == [3, 3]
    assert named in one_sentence(ends)
    assert not list(tmp_path.glob("*out-*"))


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "python"])
def test_a_source_that_changes_on_the_way_ends_every_rank_and_nothing_is_published(
    commands: Commands, large: Path, tmp_path: Path, is_native: bool
) -> None:
    changing = Path(shutil.copytree(large, tmp_path / "changing"))
    disk = commands.held_disk(is_native=is_native)
    ranks = commands.start_ranks(
        ("send", changing, *SMALL_RING), ("recv", "--out", tmp_path / "out"), disks={0: disk}
    )
    commands.await_reached(disk)
    os.truncate(changing / "model-00003-of-00003.safetensors", 1000)
    disk.release()
    ends = wait_all(ranks)
    assert codes(ends) == [3, 3]
    assert "model-00003-of-00003.safetensors" in one_sentence(ends)
    assert os.listdir(tmp_path) == ["changing"]


def test_a_target_that_is_there_ends_all_and_is_not_touched(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    old = sharded(tmp_path / "old", 2, 1000, seed=7)
    before = tree(tmp_path)
    report = tmp_path.parent / f"{tmp_path.name}.json"
    ends = commands.run_ranks(
        ("send", checkpoint, "--json", report),
        ("recv", "--out", old),
        ("recv", "--out", tmp_path / "made" / "new"),
    )
    assert codes(ends) == [7, 7, 7]
    assert all(f"{old} exists and is not empty" in end.sentence for end in ends)
    assert all("--force" in end.error for end in ends)
    assert all("rank 1 (" in ends[rank].sentence for rank in (0, 2))
    assert tree(tmp_path) == before
    # What torchrun flattens is in the result.
    result = json.loads(report.read_text())
    assert (result["ok"], result["exit_code"]) == (False, 7)
    assert str(old) in result["error"]


@pytest.mark.parametrize("kind", ["low soft limit", "low hard limit"])
def test_many_small_shards_travel_under_a_low_limit_of_open_files(
    commands: Commands, tmp_path: Path, kind: str
) -> None:
    for i in range(600):
        write_safetensors(tmp_path / "c" / f"m{i}.safetensors", {f"w{i}": ("U8", (12,))}, seed=i)
    argv = ["send", tmp_path / "c", "--nproc", "2", "--out", tmp_path / "out-{rank}"]
    argv += ["--buffer-size", "1GiB", "--staging", "2GiB", "--num-buffers", "2"]
    hard = "getrlimit(RLIMIT_NOFILE)[1]" if kind == "low soft limit" else "256"
    limited = f"from resource import *; setrlimit(RLIMIT_NOFILE, (256, {hard}))"
    end = commands.packcast(*argv, before=limited).wait()
    assert end.returncode == 0, end.stderr
    same_tree(tmp_path / "c", tmp_path / "out-1")


def test_force_replaces_an_older_copy(commands: Commands, checkpoint: Path, tmp_path: Path) -> None:
    sharded(tmp_path / "out", 3, 2000, seed=7)
    ends = commands.run_ranks(("send", checkpoint), ("recv", "--out", tmp_path / "out", "--force"))
    assert codes(ends) == [0, 0], [end.stderr for end in ends]
    same_tree(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_force_names_a_foreign_file_and_keeps_it_and_all_else(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    old = sharded(tmp_path / "old", 3, 2000, seed=7)
    (old / "1_Pooling" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    ends = commands.run_ranks(("send", checkpoint), ("recv", "--out", old, "--force"))
    assert codes(ends) == [7, 7]
    assert all("1_Pooling/thesis.tex" in end.sentence for end in ends)
    assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for 2 MiB."""
    yield from small_tmpfs(tmp_path / "small", 2 * MIB)


def test_a_full_disk_is_refused_before_any_byte_moves(
    commands: Commands, checkpoint: Path, small_disk: Path, tmp_path: Path
) -> None:
    ends = commands.run_ranks(
        ("send", checkpoint),
        ("recv", "--out", small_disk / "copy"),
        ("recv", "--out", tmp_path / "elsewhere"),
    )
    assert codes(ends) == [7, 7, 7]
    for end in ends:
        assert f"cannot write {small_disk}/copy" in end.sentence
        assert "no space" in end.sentence
        assert "2.3 MiB needed, 2.0 MiB free" in end.sentence
        assert "free some space" in end.error
    assert "sending" not in ends[0].stderr  # the line that precedes the first byte
    assert os.listdir(small_disk) == []
    room = os.statvfs(small_disk)
    assert room.f_bfree * room.f_frsize == 2 * MIB
    assert os.listdir(tmp_path) == ["small"]


NO_GPU = pytest.mark.skipif(bool(visible_gpus()), reason="there are GPUs")


@pytest.mark.parametrize(
    ("options", "code", "what", "step"),
    [
        (["--out", "{desk}/file/d"], 7, r"cannot create \S+: \S+ is not a directory", "--out"),
        (["--out", "{desk}/file"], 7, "file is not a directory", "--out names a directory"),
        (["--out", "{desk}/link"], 7, "link is a symbolic link", "give --out "),
        pytest.param(["--device", "cuda:9"], 4, "cuda:9 is not possible: .* sees no GPU", "gloo",
                     marks=NO_GPU),
        pytest.param(["--backend", "nccl"], 4, "nccl is not possible: .* sees no GPU", "gloo",
                     marks=NO_GPU),
        (["--backend", "gloo", "--device", "cuda"], 4, "works on CPU buffers", "leave out one of"),
        (["--readers", "3"], 4, "--readers 3: only 2 ranks ran `send`", "give at most 2"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_the_ranks_cannot_meet_are_named_by_each(
    options: list[str],
    code: int,
    what: str,
    step: str,
    commands: Commands,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to("there")
    before = tree(tmp_path)
    argv = ["send", checkpoint, *(word.format(desk=tmp_path) for word in options)]
    ends = commands.run_ranks(argv, argv)
    assert codes(ends) == [code, code]
    for end in ends:
        assert re.search(what, end.sentence), end.error
        assert step in end.error
    assert tree(tmp_path) == before


def test_a_target_that_appears_meanwhile_is_kept_and_the_others_publish(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    disk = commands.held_disk()
    ranks = commands.start_ranks(
        ("send", large, *SMALL_RING),
        ("recv", "--out", tmp_path / "late"),
        ("recv", "--out", tmp_path / "fine"),
        disks={0: disk},
    )
    commands.await_reached(disk)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "thesis.tex").write_text("years of work")
    disk.release()
    ends = wait_all(ranks)
    assert codes(ends) == [7, 7, 0], [end.stderr for end in ends]
    for end in ends[:2]:
        assert f"{tmp_path}/late" in end.sentence
    assert tree(tmp_path / "late") == {"thesis.tex": b"years of work"}
    same_tree(large, tmp_path / "fine")
    # It has been proven, so it is kept, and whoever runs the command is told where.
    (kept,) = set(os.listdir(tmp_path)) - {"late", "fine"}
    assert kept in ends[1].error
    same_tree(large, tmp_path / kept)


def test_a_port_in_use_is_named(commands: Commands, checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listening = commands.packcast(
            "send", checkpoint, "--workers", "1", "--listen", f"127.0.0.1:{port}"
        )
        # Under a launcher rank 0 serves the store there, with --port to choose another in Slurm.
        serving = commands.packcast("send", checkpoint, environment=rank_environment(0, 2, port))
        ends = wait_all([listening, serving])
    assert codes(ends) == [4, 4]
    for end in ends:
        assert f"127.0.0.1:{port}" in end.sentence
        assert "in use" in end.sentence
    assert "choose another port" in ends[0].error
    assert "--port" not in ends[1].error.replace("--master-port", ""), "which is for Slurm only"


def test_two_checkpoints_are_refused_with_one_sentence(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    other = sharded(tmp_path / "other", 2, 1000)
    ends = commands.run_ranks(*[("send", path) for path in (checkpoint, other, checkpoint)])
    assert codes(ends) == [4, 4, 4]
    error = one_sentence(ends)
    assert str(checkpoint) in error
    assert str(other) in error
    assert "rank 1 (" in error
    assert "give the same CKPT" in error


def test_a_group_without_a_sender_ends_with_one_sentence(commands: Commands) -> None:
    ends = commands.run_ranks(*[("recv", "--discard")] * 2)
    assert codes(ends) == [4, 4]
    error = one_sentence(ends)
    assert "no rank ran `packcast send`" in error
    assert "one launch must run `packcast send CKPT`" in error


def test_at_the_join_deadline_the_missing_rank_is_named(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    begin = time.monotonic()
    limit = ("--join-timeout", "3s")
    ends = commands.run_ranks(
        ("send", checkpoint, *limit),
        ("recv", "--out", tmp_path / "out", *limit),
        world_size=3,
    )
    assert codes(ends) == [4, 4]
    error = one_sentence(ends)
    assert "rank 2 has not joined within 3" in error
    assert "rank 1 (" in error
    assert time.monotonic() - begin < 3 + TIMEOUT_S / 3
    assert os.listdir(tmp_path) == []


def test_where_nothing_listens_a_worker_ends_at_the_join_deadline(commands: Commands) -> None:
    port = free_port()
    recv = ("recv", "--discard", "--join-timeout", "2s")
    launched = commands.packcast(*recv, environment=rank_environment(1, 2, port))
    alone = commands.packcast(*recv, f"127.0.0.1:{port}")
    ends = wait_all([launched, alone], TIMEOUT_S / 2)
    assert codes(ends) == [4, 4]
    assert f"127.0.0.1:{port}" in ends[0].sentence
    assert re.search(rf"no sender at 127.0.0.1:{port} .*: connection refused", ends[1].sentence)
    assert "is this host itself" in ends[1].error


def test_without_a_launcher_the_deadline_says_how_many_are_missing_and_who_is_there(
    commands: Commands, checkpoint: Path
) -> None:
    limit = ("--join-timeout", "8s")
    sender = commands.packcast(
        "send", checkpoint, "--workers", "2", "--listen", "127.0.0.1:0", *limit
    )
    line = sender.read_until(r"PACKCAST_TOKEN=(\S+) packcast recv (\S+) --out DIR")
    worker = commands.packcast(
        "recv", line[2], "--discard", *limit, environment={"PACKCAST_TOKEN": line[1]}
    )
    sender.read_until("joined, 1 of 2")
    ends = wait_all([sender, worker])
    assert codes(ends) == [4, 4]
    error = one_sentence(ends)
    assert "1 of 2 workers has not joined within 8" in error
    assert "the others need another address" in error  # than loopback
    assert f"pid {worker.pid}" in error


def test_strangers_and_a_surplus_worker_are_refused_without_harm(
    commands: Commands, large: Path, tmp_path: Path
) -> None:
    disk = commands.held_disk()
    sender = commands.packcast(
        *("send", large, *SMALL_RING, "--workers", "1", "--listen", "127.0.0.1:0"), disk=disk
    )
    line = sender.read_until(r"PACKCAST_TOKEN=(\S+) packcast recv (\S+) --out DIR")
    token = {"PACKCAST_TOKEN": line[1]}
    wrong = commands.packcast(
        "recv", line[2], "--discard", environment={"PACKCAST_TOKEN": "a guess at it"}
    )
    without = commands.packcast("recv", line[2], "--discard")
    ends = wait_all([wrong, without])
    assert codes(ends) == [4, 4]
    assert "this worker's token is not the sender's" in ends[0].sentence
    assert "set the same PACKCAST_TOKEN" in ends[0].error
    assert "asks for a token" in ends[1].sentence
    assert line[1] not in ends[0].stderr + ends[1].stderr

    worker = commands.packcast("recv", line[2], "--out", tmp_path / "out", environment=token)
    commands.await_reached(disk)
    surplus = commands.packcast("recv", line[2], "--discard", environment=token).wait()
    assert surplus.returncode == 4
    assert "is one too many: 1 worker has joined already" in surplus.sentence

    disk.release()
    ends = wait_all([sender, worker])
    assert codes(ends) == [0, 0], [end.stderr for end in ends]
    same_tree(large, tmp_path / "out")


def test_a_difference_is_named_and_the_others_publish(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    with (other / SHARD).open("r+b") as file:  # its last tensor, and the last of the file before
        file.seek(-10, os.SEEK_END)
        offset = file.tell()
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    with (other / "model-00003-of-00003.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 0x80]))
    ends = commands.run_ranks(
        ("send", checkpoint), ("recv", "--verify", other), ("recv", "--out", tmp_path / "out")
    )
    assert codes(ends) == [6, 6, 0], [end.stderr for end in ends]
    for end in ends[:2]:
        assert f"{SHARD} differs at byte {offset:,} (tensor layer.2.2, its byte" in end.sentence
        assert "2 of 9 tensors differ" in end.sentence
    assert "rank 1" in ends[0].sentence
    same_tree(checkpoint, tmp_path / "out")


def test_ranks_of_a_launch_with_different_tokens_are_told_so(
    commands: Commands, checkpoint: Path
) -> None:
    port = free_port()
    ranks = [
        commands.packcast(
            *("send", checkpoint, "--join-timeout", limit),
            environment=rank_environment(rank, 2, port) | {"PACKCAST_TOKEN": f"of rank {rank}"},
        )
        for rank, limit in enumerate(("4s", "2s"))  # the store's host leaves last
    ]
    sender, worker = wait_all(ranks)
    assert codes([sender, worker]) == [4, 4]
    assert re.fullmatch(
        r"rank 0 has not joined within 2.\d* s, or not with the same token as this rank",
        worker.sentence,
    )
    assert "set the same PACKCAST_TOKEN on all hosts" in worker.error


@pytest.mark.parametrize(
    ("options", "sentence", "step", "code"),
    [
        (["--buffer-size", "3MB"], "--buffer-size: '3MB' is not a size", "write 64MiB or 1GiB", 2),
        (["--out", "{desk}/out-{rank}"], "out-2 exists and is not empty", "--force", 7),
    ],
    ids=["usage", "target"],
)
def test_torchrun_prints_the_error_once_and_the_root_cause_last(
    commands: Commands,
    checkpoint: Path,
    tmp_path: Path,
    options: list[str],
    sentence: str,
    step: str,
    code: int,
) -> None:
    """It flattens every exit code, and would blame the rank that ended first."""
    sharded(tmp_path / "out-2", 2, 1000, seed=7)
    words = [word.replace("{desk}", str(tmp_path)) for word in options]
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "3", "-m", "packcast"]
    end = commands.start_warm([*launcher, "send", checkpoint, *words]).wait()
    assert end.returncode == 1
    assert end.stderr.count("packcast: error: ") == 1, end.stderr
    _, mark, cause = end.stderr.rpartition("Root Cause")
    assert mark
    assert sentence in cause
    assert step in cause
    assert f"exitcode  : {code}" in cause
    assert os.listdir(tmp_path) == ["out-2"]


def test_torchrun_blames_a_sender_whose_checkpoint_is_not_there(
    commands: Commands, tmp_path: Path
) -> None:
    missing = tmp_path / "none"
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "packcast"]
    end = commands.start_warm([*launcher, "send", missing]).wait()
    assert end.stderr.count(f"packcast: error: {missing}: no such file") == 1
    cause = end.stderr.rpartition("Root Cause")[2]
    assert f"{missing}: no such file or directory" in cause
    assert "has no entry none" in cause


def test_nproc_returns_the_true_exit_code_and_no_error_twice(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    old = sharded(tmp_path / "out-2", 2, 1000, seed=7)
    end = commands.packcast(
        "send", checkpoint, "--out", tmp_path / "out-{rank}", "--nproc", "3"
    ).wait()
    assert end.returncode == 7
    assert "Traceback" not in end.stderr
    errors = [line for line in end.stderr.splitlines() if line.startswith("packcast: error: ")]
    assert errors
    assert len(set(errors)) == len(errors), end.stderr  # rank 2's own, and what the others heard
    assert all(f"{old} exists and is not empty" in error for error in errors)
    assert os.listdir(tmp_path) == ["out-2"]


@pytest.mark.parametrize("command", [("send",), ("recv", "--discard")], ids=["send", "recv"])
def test_a_launch_of_one_rank_has_nobody_to_send_to(
    commands: Commands, checkpoint: Path, command: Sequence[str]
) -> None:
    what = [checkpoint] if command[0] == "send" else []
    (end,) = commands.run_ranks([command[0], *what, *command[1:]])
    assert end.returncode == 4
    assert end.sentence == "the group has one rank, so there are no workers to send to"
    assert "torchrun --nproc-per-node 2" in end.error


@pytest.mark.parametrize("command", ["send", "bench"])
def test_an_error_of_all_ranks_of_nproc_is_printed_once(
    commands: Commands, tmp_path: Path, command: str
) -> None:
    end = commands.packcast(command, tmp_path / "none", "--nproc", "3").wait()
    assert end.returncode == 3
    assert end.sentence == f"{tmp_path / 'none'}: no such file or directory"


def test_a_signal_before_all_have_joined_ends_the_sender_and_the_waiting(
    commands: Commands, checkpoint: Path
) -> None:
    ranks = commands.start_ranks(("send", checkpoint), ("recv", "--discard"), world_size=3)
    ranks[0].read_until("joined, 1 of 2")
    ranks[0].send_signal(signal.SIGTERM)
    ends = wait_all(ranks, 15)
    assert codes(ends) == [143, 5]
    assert ends[0].sentence == "interrupted by SIGTERM"
    assert f"pid {ranks[0].pid}): interrupted by SIGTERM" in ends[1].sentence
