"""Tensors received on the GPU, over NCCL, beside a trainer's own group: right, and repeatable.

The same program runs over gloo where there is no GPU, so that it is whole when there is one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.conftest import Gpus
from tests.helpers.commands import TORCHRUN, Commands, Ended


def assert_right(ended: Ended, num_ranks: int) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "WRONG" not in ended.stdout
    assert ended.stdout.count(" right after ") == num_ranks, ended.stdout


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_every_tensor_is_right_handed_out_and_received_into_over_nccl(
    gpus: Gpus, tmp_path: Path
) -> None:
    options = ["--standalone", "--nproc-per-node", str(gpus.num_ranks)]
    ended = gpus.torchrun(options, "tests.gpu.tensors", tmp_path, "6").wait(380)
    assert_right(ended, gpus.num_ranks)


def test_the_same_program_is_right_over_gloo(commands: Commands, tmp_path: Path) -> None:
    options = ["--standalone", "--nproc-per-node", "3", "-m", "tests.gpu.tensors"]
    argv = [*TORCHRUN, *options, tmp_path, "2"]
    ended = commands.start_warm(argv, {"CUDA_VISIBLE_DEVICES": ""}).wait()
    assert_right(ended, 3)
