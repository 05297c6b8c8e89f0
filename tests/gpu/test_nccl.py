"""The whole tool over NCCL: identical copies, GPUs of their own, bounded memory, quick deaths."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packcast.packed.plan import pinned_nbytes
from tests.gpu.conftest import Gpus
from tests.helpers.checkpoints import same_tree, write_safetensors
from tests.helpers.commands import eventually, free_port, wait_all

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def out(memory: Path) -> Iterator[Path]:
    """Where copies go; emptied after each test, since they are large."""
    folder = memory / "out"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def report_of(path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON result, after a line of it for whoever runs this."""
    report: dict[str, Any] = json.loads(path.read_text())
    stages = {name: stage["bytes_per_second"] / 1e9 for name, stage in report["stages"].items()}
    worker = next(iter(report["workers"].values()))
    stages |= {
        f"worker {name}": stage["nbytes"] / max(stage["seconds"], 1e-9) / 1e9
        for name, stage in worker["stages"].items()
    }
    with capsys.disabled():
        print(
            f"\n{what:28s} {report['group']['world_size']} ranks"
            f" {report['checkpoint']['bytes'] / 1e9:5.1f} GB in {report['seconds']:6.2f} s"
            f" = {report['bytes_per_second'] / 1e9:5.2f} GB/s; "
            + ", ".join(f"{name} {rate:.1f}" for name, rate in stages.items())
        )
    return report


def assert_memory_is_bounded(report: dict[str, Any]) -> None:
    """max_memory_reserved is the ring and at most 64 MiB; pinned memory is at most the staging."""
    ring = report["buffers"]["count"] * (report["buffers"]["size"] + PAGE)
    peaks = [report["peak_device_bytes"]]
    peaks += [worker["peak_device_bytes"] for worker in report["workers"].values()]
    assert all(ring <= peak <= ring + 64 * MIB for peak in peaks), (ring, peaks)
    pinned = pinned_nbytes(report["buffers"]["size"], report["buffers"]["staging"])
    assert report["peak_pinned_bytes"] == pinned <= report["buffers"]["staging"]


@pytest.mark.parametrize("readers", ["1", "all"])
@pytest.mark.parametrize("mode", ["out", "verify", "digests"])
def test_a_large_checkpoint_arrives_identical(
    gpus: Gpus,
    large: Path,
    out: Path,
    readers: str,
    mode: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = {"out": ["--out", f"{out}/{{rank}}"], "verify": ["--verify", large], "digests": []}
    result = gpus.single(
        *("send", large, "--readers", readers, "--json", f"{out}/r.json", *target[mode])
    )
    assert result.returncode == 0, result.stderr
    report = report_of(out / "r.json", f"{mode}, {readers} readers", capsys)
    assert report["group"]["backend"] == "nccl"
    assert_memory_is_bounded(report)
    if mode == "out":
        for rank in range(1, gpus.num_ranks):
            same_tree(large, out / str(rank))


def test_separate_launches_join_one_nccl_group_on_gpus_of_their_own(
    gpus: Gpus, large: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    send = gpus.torchrun(
        [*meet, "--node-rank", "0", "--nproc-per-node", "1"],
        *("packcast", "send", large, "--json", f"{out}/r.json"),
    )
    receive = gpus.torchrun(
        [*meet, "--node-rank", "1", "--nproc-per-node", str(gpus.num_ranks - 1)],
        *("packcast", "recv", "--out", f"{out}/{{rank}}"),
    )
    for result in wait_all([send, receive], 240):
        assert result.returncode == 0, result.stderr
    report = report_of(out / "r.json", "separate launches", capsys)
    assert report["group"]["backend"] == "nccl"
    devices = [rank["device"] for rank in report["group"]["ranks"]]
    # Both launches have a local rank 0; without somebody handing out GPUs they would meet on one.
    assert gpus.shared or len(set(devices)) == gpus.num_ranks, devices
    for rank in range(1, gpus.num_ranks):
        same_tree(large, out / str(rank))


def test_a_difference_is_found_through_the_gpu(gpus: Gpus, out: Path) -> None:
    for name in ("a", "b"):
        write_safetensors(
            out / name / "m.safetensors", {f"t{i}": ("U8", (5 * MIB,)) for i in range(3)}
        )
    with (out / "b" / "m.safetensors").open("r+b") as file:
        file.seek(-7 * MIB, 2)
        byte = file.read(1)
        file.seek(-7 * MIB, 2)
        file.write(bytes([byte[0] ^ 1]))
    port = free_port()
    ranks = [
        gpus.rank(rank, port, "send", out / "a", "--verify", out / "b")
        for rank in range(gpus.num_ranks)
    ]
    for result in wait_all(ranks):
        assert result.returncode == 6
        assert "m.safetensors differs at byte" in result.error
        assert "tensor t1" in result.error


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["worker", "sender"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_all_others_within_seconds(
    gpus: Gpus, large: Path, out: Path, victim: str, number: signal.Signals
) -> None:
    port = free_port()
    slow = ["--buffer-size", "1MiB", "--num-buffers", "1", "--staging", "4MiB"]
    ranks = [
        gpus.rank(
            rank, port, "send", large, "--out", f"{out}/{{rank}}", "--progress", "plain", *slow
        )
        for rank in range(gpus.num_ranks)
    ]
    ranks[0].read_until("sending ")
    partial = ".1.packcast-*/model-00001-of-00004.safetensors"
    eventually(lambda: any(map(_has_begun, out.glob(partial))), "bytes on worker 1")
    lost = ranks[1 if victim == "worker" else 0]
    survivors = [rank for rank in ranks if rank is not lost]
    assert all(rank.process.poll() is None for rank in ranks), "too quick to be killed"
    lost.send_signal(number)
    began = time.monotonic()
    results = wait_all(survivors, 20)
    seconds = time.monotonic() - began
    for result in results:
        assert result.returncode == 5
        assert "lost" in result.error
        assert f"pid {lost.pid}" in result.error
    assert seconds < (10 if number == signal.SIGSTOP else 6), seconds
    lost.kill()
    left = {path.name.split(".packcast")[0] for path in out.glob(".*")}
    assert left <= {".1"} if victim == "worker" else not left, (
        "only the dead leave something behind"
    )


def _has_begun(shard: Path) -> bool:
    """Reserved space reads as zeros until bytes arrive."""
    with shard.open("rb") as file:
        return bool(int.from_bytes(file.read(8), "little"))


def test_twenty_rounds_of_delays_find_no_race(gpus: Gpus) -> None:
    options = ["--standalone", "--nproc-per-node", str(gpus.num_ranks)]
    result = gpus.torchrun(options, "tests.gpu.race", "20").wait(280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" right,") == 20 * gpus.num_ranks
