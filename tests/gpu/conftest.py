"""Ranks on GPUs: one each where there are several, else sharing one, over NCCL all the same.

NCCL lets ranks share a GPU that it takes for ranks of different hosts (NCCL_HOSTID); it then talks
over sockets, so speeds mean nothing there, but streams, events and collectives are the real ones.
PACKCAST_TEST_GIB sets the size of the checkpoint (1 unless told otherwise).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.commands import (
    PACKCAST,
    TORCHRUN,
    Command,
    Commands,
    Ended,
    rank_environment,
)

GIB = 1 << 30
MIN_RANKS = 3
# Where pages are memory, so that neither the disk nor its size matters.
FAST = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Gpus:
    """How many ranks there are, and how each is started."""

    commands: Commands
    num_ranks: int
    shared: bool
    script: Path

    def torchrun(self, options: Sequence[str], module: str, *argv: str | Path) -> Command:
        """`torchrun OPTIONS -m MODULE ARGV`."""
        program = ["--no-python", str(self.script), module] if self.shared else ["-m", module]
        return self.commands.start([*TORCHRUN, *options, *program, *argv], self.environment())

    def single(self, *argv: str | Path) -> Ended:
        """`packcast ARGV` on all ranks by one torchrun, and its end."""
        options = ["--standalone", "--nproc-per-node", str(self.num_ranks)]
        return self.torchrun(options, "packcast", *argv).wait(240)

    def rank(self, rank: int, port: int, *argv: str | Path) -> Command:
        """One rank by itself."""
        environment = self.environment() | rank_environment(rank, self.num_ranks, port)
        if self.shared:
            environment["NCCL_HOSTID"] = f"host{rank}"
        return self.commands.start([*PACKCAST, *argv], environment)

    def environment(self) -> dict[str, str]:
        """What the machine says about CUDA and NCCL, which other tests must not depend on."""
        kept = ("NCCL_", "TORCH_", "CUDA_", "PYTHONPATH")
        return {name: value for name, value in os.environ.items() if name.startswith(kept)}


@pytest.fixture
def gpus(commands: Commands, tmp_path: Path) -> Gpus:
    """The ranks; skipped where there is no GPU."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        pytest.skip("no GPU")
    script = tmp_path / "rank.sh"
    script.write_text('#!/bin/sh\nexport NCCL_HOSTID="host$RANK"\nexec python3 -m "$@"\n')
    script.chmod(0o755)
    shared = count < 2
    return Gpus(commands, MIN_RANKS if shared else count, shared, script)


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on tmpfs, emptied at the end."""
    import shutil

    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    folder = FAST / f"packcast-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def large(memory: Path) -> Path:
    """A generated checkpoint of four shards, Llama-like in its large tensors, of random bytes."""
    import torch

    nbytes = int(float(os.environ.get("PACKCAST_TEST_GIB", "1")) * GIB)
    folder = memory / "large"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for i in range(1, 5):
        shard, at = f"model-{i:05d}-of-00004.safetensors", 0
        header: dict[str, object] = {}
        while at < nbytes // 4:
            count = min(nbytes // 4 - at, 4096 * 14336 * 2) // 2
            name = f"layers.{i}.{len(header)}.weight"
            header[name] = {"dtype": "BF16", "shape": [count], "data_offsets": [at, at + 2 * count]}
            at += 2 * count
        text = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for begin in range(0, at, 1 << 28):
                size = min(1 << 28, at - begin)
                data = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda").cpu()
                file.write(data.numpy().data)
        weight_map |= dict.fromkeys(header, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder
