"""Ranks whose host is short of memory: it is told before the first byte, or less is taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from packcast import Report, TransferError, View, receive_checkpoint
from packcast.io.memory import MemoryLimit
from packcast.settings import DEFAULT_NUM_BUFFERS
from packcast.transfer import host_share, session
from packcast.units import GIB, MIB
from packcast.view import Snapshot, Start
from tests.helpers.cgroups import control_group
from tests.helpers.checkpoints import same_tree, write_safetensors
from tests.helpers.commands import Commands
from tests.helpers.library import TOKEN, failed, succeeded, transfer


class Told(View):
    """Keeps the start line's facts and the warnings."""

    def __init__(self) -> None:
        self.start: Start | None = None
        self.warnings: list[str] = []

    def started(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        self.start = start

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "model" / "m.safetensors", {"w": ("U8", (5 * MIB,))})
    return tmp_path / "model"


def left(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    """What a limit leaves all ranks of this process together."""
    limits = (MemoryLimit(key="box", free=mib * MIB, name="the limit of the box"),)
    monkeypatch.setattr(session, "memory_limits", lambda: limits)


def test_if_memory_is_short_buffers_are_few_and_small_with_a_warning(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(monkeypatch, 200)
    view = Told()
    receiver = partial(receive_checkpoint, token=TOKEN, out=tmp_path / "copy")
    outcomes = transfer(
        checkpoint, receiver, buffer_size=None, num_buffers=DEFAULT_NUM_BUFFERS, view=view
    )
    reports: list[Report] = succeeded(outcomes)
    same_tree(checkpoint, tmp_path / "copy")
    assert [(it.buffer_size, it.num_buffers) for it in reports] == [(16 * MIB, 2)] * 2
    (note,) = [text for text in view.warnings if "token" not in text]
    assert note.startswith("low on memory: 2 buffers of 16MiB instead of 4 buffers of 16MiB")
    assert note.endswith(
        "and 1 other rank there need 128 MiB for 4 buffers of 16MiB,"
        " and the limit of the box leaves 200 MiB"
    )
    assert note in reports[0].warnings
    assert view.start is not None
    assert view.start.is_low


def test_sizes_that_do_not_fit_end_all_ranks_before_anything_is_made(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(monkeypatch, 200)
    receiver = partial(receive_checkpoint, token=TOKEN, out=tmp_path / "copy")
    errors = failed(transfer(checkpoint, receiver, buffer_size=64 * MIB, num_buffers=2))
    assert all(isinstance(error, TransferError) for error in errors)
    assert all("need 256 MiB for 2 buffers of 64MiB" in str(error) for error in errors)
    assert not list(tmp_path.glob("*copy*"))


def test_a_rank_whose_memory_went_meanwhile_says_so_before_the_first_byte(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    less = (MemoryLimit(key="box", free=5 * MIB, name="the limit of the box"),)
    monkeypatch.setattr(host_share, "memory_limits", lambda: less)
    receiver = partial(receive_checkpoint, token=TOKEN, out=tmp_path / "copy")
    errors = failed(transfer(checkpoint, receiver, buffer_size=4 * MIB, num_buffers=2))
    said = "no memory for 2 buffers of 4MiB: they need 8.0 MiB, and the limit of the box leaves 5.0"
    assert all(said in str(error) for error in errors)
    assert not list(tmp_path.glob("*copy*"))


def test_in_a_container_it_is_the_containers_limit_that_is_told(
    commands: Commands, checkpoint: Path, tmp_path: Path
) -> None:
    with control_group(3 * GIB) as group:
        argv = ["send", checkpoint, "--nproc", "2", "--out", tmp_path / "copy-{rank}"]
        wide = ("--buffer-size", "1GiB", "--num-buffers", "2", "--staging", "1GiB")
        enter = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))"
        end = commands.packcast(*argv, *wide, before=enter).wait()
        assert end.returncode == 5
        assert "and 1 other rank there need 4.0 GiB for 2 buffers of 1GiB" in end.sentence
        assert f"and the limit of 3.0 GiB in {group}/memory." in end.sentence
        assert "reduce --buffer-size and --num-buffers on the sender" in end.error
        assert commands.packcast(*argv, before=enter).wait().returncode == 0
    same_tree(checkpoint, tmp_path / "copy-1")
