"""A table of what users get wrong: the command line, the exit code, what is said, the next step.

Here is what one process finds by itself; `tests/transfer/test_failures.py` has what takes ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from packcast.cli.app import run
from tests.cli.conftest import FakeTransfer
from tests.helpers.commands import hydra_rank, open_mpi_rank, slurm_task


@dataclass(frozen=True, slots=True)
class Mistake:
    """A command line, run beside the files of `desk`.

    `what` is how the message begins, with option or path; `step` is in the lines after it.
    """

    line: str
    code: int
    what: str
    step: str
    environ: Mapping[str, str] = field(default_factory=dict)


TABLE = [
    # -- the checkpoint ---------------------------------------------------------------------------
    Mistake("send nothere --dry-run", 3, "nothere: no such file or directory", "has no entry not"),
    Mistake("send ckpy --nproc 2", 3, "ckpy: no such file or directory", "did you mean ckpt?"),
    Mistake("send ckpy --workers 1 --listen h:1", 3, "ckpy: no such file", "did you mean ckpt?"),
    Mistake("inspect /no/such/path", 3, "/no/such/path: no such file", "directory / has no entry"),
    Mistake("send ckpy --dry-run", 3, "ckpy: no such file or directory", "did you mean ckpt?"),
    Mistake("verify ckpt modle", 3, "modle: no such file or directory", "did you mean model"),
    Mistake("inspect org/name", 3, "org/name: no such file", "`hf download org/name` brings it"),
    Mistake("send ckpt@main --dry-run", 3, "ckpt@main: no such file", "did you mean ckpt?"),
    Mistake("send empty --dry-run", 3, "empty: no .safetensors file in this directory: it is empty",
            "give the directory that holds the .safetensors files"),
    Mistake("send bin --dry-run", 3, "bin: no .safetensors file in this directory: a PyTorch (pick",
            "convert model.bin to safetensors first"),
    Mistake("send gguf --dry-run", 3, "gguf: no .safetensors file in this directory: a directory of"
            " GGUF files", "convert model.gguf to safetensors first"),
    Mistake("inspect home/hub", 3, "home/hub: a Hugging Face cache, which holds several models",
            "give one by its name, as in org/model"),
    Mistake("inspect home", 3, "home: no .safetensors file in this directory: the home of the Hug",
            "give a model's name, as in org/name"),
    Mistake("inspect dangling", 3, "model.safetensors: a dangling symlink to gone",
            "the download or copy is probably incomplete"),
    Mistake("inspect outside", 3, "model.safetensors: a symlink to ", "--follow-links follows it"),
    Mistake("send cut --dry-run", 3, "model.safetensors: truncated: 188 bytes, expected 193",
            "copy or download it again"),
    Mistake("send lost --dry-run", 3, "model.safetensors.index.json: 1 of 2 shards are not there",
            "--all-files sends what is there"),
    Mistake("inspect lost/model.safetensors.index.json", 3, "lost/model.safetensors.index.json: an"
            " index, not a checkpoint", "give its directory: lost"),
    Mistake("inspect ckpt/config.json", 3, "config.json: not a safetensors file",
            "give the checkpoint's directory, or one .safetensors file"),
    # -- what of it is sent -----------------------------------------------------------------------
    Mistake("send ckpt --dry-run --include layer.*", 2, "--include 'layer.*' matches no tensor",
            "near names are layers.0.weight; `packcast inspect CKPT --tensors` lists all"),
    Mistake("send ckpt --dry-run --include *.q_proj", 2, "--include '*.q_proj' matches no tensor",
            "its tensors are layers.0.weight; `packcast inspect"),
    Mistake("send ckpt --dry-run --exclude *", 2, "--exclude '*' leaves no tensor to send",
            "`packcast inspect CKPT --tensors` lists"),
    Mistake("send ckpt --dry-run --exclude-files *", 2, "ckpt: no .safetensors file is left in this"
            " directory by --exclude-files", "--dry-run shows"),
    # -- who takes part ---------------------------------------------------------------------------
    *(
        Mistake("send ckpt", 2, "no workers to send to: no launcher started", way, environ)
        for environ in (
            {},
            slurm_task("7", 0, 1),  # a shell of `srun --pty`
            open_mpi_rank("7", 0, 1),
            hydra_rank(0, 1),
        )
        for way in (
            "packcast send CKPT --out 'DIR-{rank}' --nproc 3",
            "packcast send CKPT --workers 3 --listen HOST:29400",
            "torchrun --no-python --nproc-per-node 4 packcast send CKPT",
            "srun packcast send CKPT --out",
            "mpirun -n 4 packcast send CKPT --out",
        )
    ),
    Mistake("send ckpt --nproc 2 --out cut", 7, "{desk}/cut exists and is not empty", "--force"),
    Mistake("send ckpt --nproc 1", 2, "--nproc: must be at least 2", "see `packcast send --help`"),
    Mistake("send ckpt --nproc abc", 2, "--nproc: must be a whole number", "send --help"),
    Mistake("bench --nproc 1", 2, "--nproc: must be at least 2", "see `packcast bench --help`"),
    Mistake("send ckpt --nproc 2 --workers 1 --listen h:1", 2, "--nproc starts the workers itself;"
            " --workers waits for others", "give only one of them"),
    Mistake("send ckpt --workers 1", 2, "--workers needs --listen",
            "give a name or address of this host that the workers can reach, and a port"),
    Mistake("send ckpt --workers 0 --listen h:1", 2, "--workers: must be at least 1", "--help"),
    Mistake("send ckpt --listen h:1", 2, "--listen needs --workers", "number of `packcast recv`"),
    Mistake("send ckpt --workers 1 --listen node1", 2, "--listen: 'node1' is not HOST:PORT",
            "for example node1:29400"),
    Mistake("send ckpt --workers 1 --listen node1:http", 2, "--listen: 'http' is not a port",
            "a port is at most 65535"),
    Mistake("send ckpt --workers 1 --listen h:1 --out d", 2, "--out has no effect here",
            "give it to the workers: `packcast recv HOST:PORT --out ...`"),
    Mistake("recv node1 --discard", 2, "HOST:PORT: 'node1' is not HOST:PORT", "node1:29400"),
    Mistake("recv node1:0 --discard", 2, "port 0 cannot be connected to", "that `send` shows"),
    Mistake("recv 10.0.0.1:0 --discard", 2, "port 0 cannot be connected to", "that `send` shows"),
    Mistake("recv --discard", 2, "no address of the sender: HOST:PORT is missing",
            "`packcast send --workers N --listen HOST:PORT` prints the line to run"),
    Mistake("recv h:1 --discard --port 5", 2, "--port is only for Slurm", "--master-port"),
    Mistake("doctor --reach 10.0.0.1:0", 2, "--reach: port 0 cannot be conn", "node1:29400"),
    Mistake("doctor --reach node1", 2, "--reach: 'node1' is not HOST:PORT", "node1:29400"),
    Mistake("doctor --reach node1:70000", 2, "--reach: 70000 is not a port", "at most 65535"),
    Mistake("recv node1:70000 --discard", 2, "HOST:PORT: 70000 is not a port", "at most 65535"),
    Mistake("recv h:1 --discard --rank 0", 2, "--rank: must be at least 1, not 0", "--help"),
    Mistake("recv h:1 --discard --in-place", 2, "--in-place needs --out", "that directory"),
    Mistake("send ckpt --workers 1 --listen h:1 --verify d", 2, "--verify has no effect here",
            "`packcast recv HOST:PORT --verify ...`"),
    Mistake("send ckpt --workers 1 --listen h:1 --out d --in-place", 2, "--out has no effect here",
            "`packcast recv HOST:PORT --out ...`"),
    Mistake("send ckpt --nproc 2 --port 99999", 2, "--port: must be at most 65535", "--help"),
    Mistake("send ckpt --nproc 2 --readers some", 2, "--readers: must be a whole number of at least"
            " 1, or `all`, not 'some'", "the default is 1"),
    Mistake("send ckpt --nproc 2 --readers 0", 2, "--readers: must be a whole number", "is 1"),
    # -- the token --------------------------------------------------------------------------------
    Mistake("recv h:1 --discard --token-file nope", 2, "--token-file: nope: No such file",
            "make one with `openssl rand -hex 16 > nope`"),
    Mistake("recv h:1 --discard --token-file blank", 2, "--token-file: blank is empty",
            "`openssl rand -hex 16` makes a token"),
    Mistake("recv h:1 --discard", 2, "PACKCAST_TOKEN: a token must have 1 to 4096 bytes, not 5000",
            "`openssl rand -hex 16` makes one", {"PACKCAST_TOKEN": "x" * 5000}),
    # -- buffers, devices, times ------------------------------------------------------------------
    Mistake("send ckpt --nproc 2 --backend mpi", 2, "--backend: 'mpi' is not one of 'auto', 'nccl'",
            "see `packcast send --help`"),
    Mistake("send ckpt --nproc 2 --device gpu", 2, "--device: 'gpu' is not one of auto, cpu, cuda",
            "N counts from 0"),
    Mistake("send ckpt --nproc 2 --device tpu", 2, "--device: 'tpu' is not one of auto, cpu, cuda",
            "N counts from 0"),
    Mistake("recv h:1 --discard --device tpu", 2, "--device: 'tpu' is not one of", "from 0"),
    Mistake("bench --nproc 2 --device tpu", 2, "--device: 'tpu' is not one of", "from 0"),
    Mistake("send ckpt --nproc 2 --buffer-size 3MB", 2, "--buffer-size: '3MB' is not a size",
            "sizes are binary: write 64MiB or 1GiB"),
    Mistake("send ckpt --nproc 2 --buffer-size 0", 2, "--buffer-size: 0 is too small", "is 1MiB"),
    Mistake("send ckpt --nproc 2 --buffer-size 1TiB", 2, "buffer size 1024GiB is not a multiple of",
            "try --buffer-size 16MiB"),
    Mistake("send ckpt --nproc 2 --staging 1MiB", 2, "staging of 1MiB is less than the 33MiB that",
            "try --staging 33MiB, or smaller buffers"),
    Mistake("send ckpt --nproc 2 --num-buffers 1.5", 2, "--num-buffers: must be a whole number",
            "--help"),
    Mistake("send ckpt --nproc 2 --staging lots", 2, "--staging: 'lots' is not a size", "64MiB"),
    Mistake("send ckpt --nproc 2 --num-buffers 0", 2, "0 buffers: the count must be from 1 to 1024",
            "the default is 4"),
    Mistake("send ckpt --nproc 2", 2, "--buffer-size (from PACKCAST_BUFFER_SIZE): 'nonsense'",
            "sizes are binary", {"PACKCAST_BUFFER_SIZE": "nonsense"}),
    Mistake("recv h:1 --discard --join-timeout soon", 2, "--join-timeout: 'soon' is not a duration",
            "write durations as 3s or 5min"),
    Mistake("recv h:1 --discard --join-timeout 0", 2, "--join-timeout: must be greater than 0",
            "write durations as 3s or 5min"),
    Mistake("bench --size lots", 2, "--size: 'lots' is not a size", "write 64MiB or 1GiB"),
    Mistake("bench ckpt --size 1GiB --nproc 2", 2, "--size is for generated weights, but a CKPT is",
            "leave out one of the two"),
    # -- where it goes ----------------------------------------------------------------------------
    Mistake("recv h:1", 2, "give one of --out, --verify or --discard", "--help describes each"),
    Mistake("send ckpt --nproc 2 --out d --verify e", 2, "give only one of --out or --verify",
            "--help"),
    Mistake("recv h:1 --discard --force", 2, "--force needs --out", "the copy in --out DIR"),
    Mistake("recv h:1 --out d --digest sha256", 2, "--digest needs --manifest", "the kind"),
    Mistake("recv h:1 --discard --progress loud", 2, "--progress: 'loud' is not one of 'auto'",
            "--help"),
    Mistake("recv h:1 --out d --verify e", 2, "give only one of --out, --verify or --discard",
            "--help describes each"),
    Mistake("send ckpt --nproc 2 --out d-{ranks}", 2, "--out: {ranks} is not a placeholder",
            "the placeholders are {rank}, {local_rank}, {host}"),
    Mistake("send ckpt --nproc 2 --out=", 2, "--out: the path is empty", "the shell variable"),
    Mistake("send ckpt --nproc 2 --force", 2, "--force needs --out", "the copy in --out DIR"),
    Mistake("send ckpt --nproc 2 --out d --manifest d/m.txt", 2, "--manifest: d/m.txt is inside the"
            " copy", "put it beside it, as in d.xxh128"),
    Mistake("send ckpt --nproc 2 --manifest m.txt", 2, "--manifest needs --out", "`packcast"),
    Mistake("send ckpt --nproc 2 --report r", 2, "--report needs --verify", "the comparison"),
    Mistake("recv h:1 --discard --json nowhere/r.json", 2, "--json: the directory nowhere does not",
            "create it first"),
    Mistake("recv h:1 --discard --json empty", 2, "--json: empty is a directory", "a file's name"),
    Mistake("verify ckpt", 2, "ckpt: nothing to compare it with: there is no ckpt.xxh128",
            "give another copy, or a manifest with --against"),
    Mistake("verify ckpt --against nope", 3, "nope: cannot be read", "writes a manifest of a copy"),
    Mistake("clean nothere", 2, "nothere: no such directory", "has no entry nothere"),
    Mistake("clean short", 2, "short is not a directory", "give the directory that copies"),
    # -- the words themselves ---------------------------------------------------------------------
    Mistake("sned ckpt", 2, "there is no command sned; a near name is send", "`packcast --help`"),
    Mistake("send ckpt --outt d", 2, "there is no option --outt; near names are --out,", "--help"),
    Mistake("recv h:1 d --discard", 2, "unexpected argument: d", "see `packcast recv --help`"),
    Mistake("send", 2, "CKPT is missing", "see `packcast send --help`"),
    Mistake("verify", 2, "DIR is missing", "see `packcast verify --help`"),
]  # fmt: skip


def write_shard(path: Path, *names: str) -> None:
    header = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": [16 * i, 16 * i + 16]}
        for i, name in enumerate(names)
    }
    data = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(16 * len(names)))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a checkpoint, and what is often taken for one."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write_shard(Path("ckpt/model.safetensors"), "layers.0.weight", "layers.1.weight")
    Path("ckpt/config.json").write_text("{}")
    write_shard(Path("model/model.safetensors"), "a")
    write_shard(Path("lost/a.safetensors"), "a")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    Path("lost/model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("empty", "bin", "gguf", "dangling", "outside", "cut"):
        Path(name).mkdir()
    Path("home/hub/models--org--model/snapshots/abc").mkdir(parents=True)
    for name in ("bin", "gguf"):
        Path(name, f"model.{name}").write_bytes(b"x")
    Path("dangling/model.safetensors").symlink_to("gone")
    Path("outside/model.safetensors").symlink_to("../ckpt/model.safetensors")
    Path("cut/model.safetensors").write_bytes(Path("ckpt/model.safetensors").read_bytes()[:-5])
    Path("short").write_text("abc")
    Path("blank").touch()
    return tmp_path


def message(said: str) -> tuple[str, str]:
    """The error's first line without its mark, and the rest; there is one, and no traceback."""
    assert said.count("packcast: error: ") == 1, said
    assert "Traceback" not in said
    what, _, step = said.partition("packcast: error: ")[2].partition("\n")
    return what, step


@pytest.mark.parametrize("mistake", TABLE, ids=lambda mistake: mistake.line)
def test_a_mistake_is_met_with_what_where_and_the_next_step(
    mistake: Mistake,
    desk: Path,
    transfer: FakeTransfer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in mistake.environ.items():
        monkeypatch.setenv(name, value)
    assert run(mistake.line.split(" ")) == mistake.code
    captured = capsys.readouterr()
    what, step = message(captured.err)
    assert what.startswith(mistake.what.replace("{desk}", str(desk)))
    assert mistake.step in step
    assert captured.out == ""
    assert not transfer.settings, "nothing was begun"


def test_what_may_not_be_read_or_written_is_named(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read and write everything")
    Path("ckpt/model.safetensors").chmod(0)
    assert run(["inspect", "ckpt"]) == 3
    what, step = message(capsys.readouterr().err)
    assert what == "model.safetensors: cannot be read: permission denied"
    assert "check its permissions" in step
    Path("empty").chmod(0o500)
    assert run(["recv", "h:1", "--discard", "--json", "empty/r.json"]) == 2
    what, step = message(capsys.readouterr().err)
    assert what == "--json: empty/r.json is not writable"
    assert "check the permissions" in step


@pytest.mark.parametrize("count", [2, 20_000])
def test_near_names_of_tensors_are_found_among_many(
    count: int, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("q_proj", "k_proj", "down_proj")
    names = tuple(f"model.layers.{i // 3}.{parts[i % 3]}.weight" for i in range(count))
    write_shard(Path("many/model.safetensors"), *names)
    assert run(["send", "many", "--dry-run", "--include", "*.q_porj.*"]) == 2
    _, step = message(capsys.readouterr().err)
    assert "near names are model.layers.0.q_proj.weight" in step
    assert "and" not in step.partition(";")[0]
