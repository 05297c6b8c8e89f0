"""The library over NCCL, by a process group and by a bare communicator: right, flat, and how fast.

The same program runs over gloo where there is no GPU, so that it is whole when there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.gpu.conftest import Gpus
from tests.gpu.table import WAYS
from tests.helpers.commands import Commands, Ended, wait_all

GROUPS = 3
TABLE_LINES = 1 + 3 * (1 + len(WAYS))


def assert_all_right(ended: Ended, num_ranks: int) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "WRONG" not in ended.stdout
    assert ended.stdout.count(" right, ") == GROUPS * num_ranks, ended.stdout


def assert_is_table(ended: Ended) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(ended.stdout.splitlines()) == TABLE_LINES, ended.stdout


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_every_value_is_right_over_both_kinds_of_groups_and_memory_stays_flat(gpus: Gpus) -> None:
    options = ["--standalone", "--nproc-per-node", str(gpus.num_ranks)]
    ended = gpus.torchrun(options, "tests.gpu.api", "rounds", "10").wait(380)
    assert_all_right(ended, gpus.num_ranks)
    assert ended.stdout.count("reserved memory +0") == GROUPS * gpus.num_ranks


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_how_fast_resident_weights_are(gpus: Gpus, capsys: pytest.CaptureFixture[str]) -> None:
    # Ranks that share a GPU talk over sockets: there only that all ways work counts.
    size = ["0.02", "1"] if gpus.shared else [os.environ.get("PACKCAST_TEST_GIB", "1"), "5"]
    options = ["--standalone", "--nproc-per-node", str(gpus.num_ranks)]
    ended = gpus.torchrun(options, "tests.gpu.api", "table", *size).wait(380)
    assert_is_table(ended)
    with capsys.disabled():
        print(f"\n{ended.stdout}")


@pytest.fixture
def over_gloo(commands: Commands) -> Callable[..., Ended]:
    """Three ranks of the program that see no GPU, and what they say together."""

    def run(*argv: str) -> Ended:
        no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
        ends = wait_all(commands.start_program(3, "-m", "tests.gpu.api", *argv, environment=no_gpu))
        said = ("".join(end.stdout for end in ends), "".join(end.stderr for end in ends))
        return Ended(max((end.returncode for end in ends), key=abs), *said)

    return run


def test_the_same_rounds_are_right_over_gloo(over_gloo: Callable[..., Ended]) -> None:
    assert_all_right(over_gloo("rounds", "1"), 3)


def test_the_same_table_is_made_over_gloo(over_gloo: Callable[..., Ended]) -> None:
    assert_is_table(over_gloo("table", "0.005", "1"))
