"""A small checkpoint on disk, and processes to send it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkpoints import sharded
from tests.helpers.commands import Commands


@pytest.fixture
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as started:
        yield started


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of less than a MiB."""
    return sharded(tmp_path_factory.mktemp("checkpoints") / "model", 3, 1_000_000)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, 70 MiB together: more than any ring and sockets' buffers hold in between."""
    return sharded(tmp_path_factory.mktemp("checkpoints") / "large", 3, 30_000_000)
