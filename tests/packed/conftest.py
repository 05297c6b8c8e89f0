"""What decides how a pair of replays copies, for the tests of all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.packed.replays import copying


@pytest.fixture(params=["plain", "table"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each way of copying."""
    with copying(request.param):
        yield
