"""`--max-rate` on whole commands: how long one takes, and that a pause is no stall and no death."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from packcast import UsageError, receive_checkpoint, send_checkpoint
from packcast.units import MIB
from tests.helpers.checkpoints import same_tree, write_safetensors
from tests.helpers.commands import Commands, wait_all
from tests.helpers.library import TOKEN, succeeded, transfer


@pytest.fixture
def one_tensor(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_safetensors(folder / "model.safetensors", {"w": ("U8", (3 * MIB // 2,))})
    return folder


def test_the_data_phase_takes_as_long_as_the_rate_says_and_no_pause_is_a_stall(
    commands: Commands, one_tensor: Path, tmp_path: Path
) -> None:
    # A chunk takes longer than the stall timeout, also for another reader's chunks.
    limits = ("--stall-timeout", "1s")
    send = ("send", one_tensor, "--out", tmp_path / "copy-{rank}", "--readers", "all", *limits)
    options = ("--max-rate", "0.7MB/s", "--buffer-size", "1MiB", "--json", tmp_path / "result")
    ends = commands.run_ranks((*send, *options), send, ("recv", "--discard", *limits))
    assert [end.returncode for end in ends] == [0, 0, 0], [end.stderr for end in ends]
    same_tree(one_tensor, tmp_path / "copy-1")
    result = json.loads((tmp_path / "result").read_text())
    assert result["seconds"] >= 3 * MIB / 2 / 0.7e6


@pytest.mark.parametrize("max_rate", ["1MB/s", 1e6, 1_000_000], ids=repr)
def test_the_library_has_it_too(one_tensor: Path, max_rate: float | str) -> None:
    receiver = partial(receive_checkpoint, token=TOKEN, discard=True)
    for report in succeeded(transfer(one_tensor, receiver, max_rate=max_rate)):
        assert report.seconds >= 3 * MIB / 2 / 1e6


@pytest.mark.parametrize("max_rate", ["fast", "2", "0GB/s", 0, -1.0, float("nan")], ids=repr)
def test_a_rate_that_is_none_is_refused_before_anybody_is_waited_for(max_rate: float | str) -> None:
    with pytest.raises(UsageError, match=r"^max_rate: "):
        send_checkpoint("nowhere", max_rate=max_rate)


@pytest.mark.chaos
def test_a_sender_that_pauses_hears_of_a_death_at_once(
    commands: Commands, one_tensor: Path
) -> None:
    slow = ("--max-rate", "1KB/s", "--heartbeat-timeout", "5min")
    ranks = commands.start_ranks(("send", one_tensor, *slow), ("recv", "--discard"))
    ranks[0].read_until("sending ")
    ranks[1].kill()
    (end,) = wait_all(ranks[:1], 10)
    assert end.returncode == 5
    assert "lost rank 1 (" in end.sentence
