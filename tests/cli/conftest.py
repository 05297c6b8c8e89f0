"""A transfer that moves nothing, and a small checkpoint on disk."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

import packcast
from packcast.cli import start
from packcast.errors import PackcastError
from packcast.report import Report
from packcast.settings import Settings
from packcast.view import Snapshot, Start, View, WorkerState

Runner = Callable[[Settings, View], Report]


@dataclass
class FakeTransfer:
    """Stands in for packcast.transfer; `does` is what `run` does, `settings` what it was given.

    `parents` are the processes that this one promised to die with.
    """

    does: Runner | None = None
    settings: list[Settings] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)

    def run(self, settings: Settings, view: View, exit_handler: object) -> Report:
        self.settings.append(settings)
        if self.does:
            return self.does(settings, view)
        return Report(command=settings.command, is_sender=settings.command == "send", rank=0)


class FakeLeaver:
    """Leaves by SystemExit, where the real one ends the process."""

    def __init__(
        self,
        printer: Callable[[PackcastError], None],
        *,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._printer = printer

    def leave(self, error: PackcastError) -> NoReturn:
        self._printer(error)
        raise SystemExit(error.exit_code)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("PACKCAST_", "SLURM_", "OMPI_", "PMI_")) or name in (
            "RANK",
            "WORLD_SIZE",
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make this process look like a rank of a torchrun of four."""

    def be(rank: int) -> None:
        names = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 4}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")

    return be


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> FakeTransfer:
    fake = FakeTransfer()
    module = types.ModuleType("packcast.transfer")
    monkeypatch.setattr(module, "run", fake.run, raising=False)
    monkeypatch.setitem(sys.modules, "packcast.transfer", module)
    monkeypatch.setattr(packcast, "transfer", module, raising=False)
    monkeypatch.setattr(start, "ProcessExit", FakeLeaver)
    monkeypatch.setattr(start, "watch_signals", lambda exit_handler, **_: None)
    monkeypatch.setattr(start, "die_with_parent", fake.parents.append)
    return fake


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One shard of two tensors and a config."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b\x1b[31m": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
        }
    ).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(26)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")
    return folder


def start_of(*, is_sender: bool = True, loud: bool = False, rank: int = 0) -> Start:
    return Start(
        rank=rank,
        is_sender=is_sender,
        num_files=2,
        num_tensors=7,
        nbytes=1 << 30,
        world_size=4,
        readers=(0,),
        backend="gloo",
        device="cpu",
        reason="no GPU on host-a",
        loud=loud,
        buffer_size=16 << 20,
        num_buffers=4,
        staging=512 << 20,
        pool="native",
    )


def snapshot_of(
    done: int, total: int = 100, workers: dict[int, int] | None = None, **stages: str
) -> Snapshot:
    """`stages`: what a worker waits for, as rank_1="write"."""
    states = {
        rank: WorkerState(nbytes, stages.get(f"rank_{rank}", "broadcast"))
        for rank, nbytes in (workers or {}).items()
    }
    moved = {"read": done, "broadcast": done, "write": done // 2}
    return Snapshot(done, total, moved, states, "m.safetensors", stages.get("mine", "broadcast"))
