"""Checkpoints on disk: a small one, and one that no ring holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import sharded


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of less than a MiB."""
    return sharded(tmp_path_factory.mktemp("checkpoints") / "model", 3, 1_000_000)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, 70 MiB together: more than any ring and sockets' buffers hold in between."""
    return sharded(tmp_path_factory.mktemp("checkpoints") / "large", 3, 30_000_000)
