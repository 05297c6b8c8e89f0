"""What `--nproc` hands to a rank, for a test that is one."""

from __future__ import annotations

import os

import pytest

from packcast.launch.handover import HANDOVER_VARIABLE, Handover


def hand_over(monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, launcher_pid: int = 1) -> Handover:
    """Make this process a rank of `--nproc`, as far as it can know; the descriptors stay open."""
    _, failures = os.pipe()
    handover = Handover(
        rank=rank,
        launcher_pid=launcher_pid,
        token="between the ranks of one launch",
        port_fd=os.pipe()[rank == 0],
        failures_fd=failures,
        said_fd=os.memfd_create("said"),
    )
    # At a number of its own, since what a process has read under one is remembered.
    fd = os.dup2(handover.write(), 100 + failures)
    monkeypatch.setenv(HANDOVER_VARIABLE, str(fd))
    return handover
