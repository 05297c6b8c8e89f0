"""Fixtures of this room: how replays copy, and a GPU without first-time delays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.packed.replays import copying
from tests.packed.streams import warm_up


@pytest.fixture(params=["plain", "table"])
def copies(request: pytest.FixtureRequest) -> Iterator[None]:
    """Copies by table and plain ones."""
    with copying(request.param):
        yield


@pytest.fixture
def warm() -> None:
    """Kernels are loaded and streams have memory."""
    warm_up()
