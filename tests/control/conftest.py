from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.control.helpers import Group


@pytest.fixture
def group() -> Iterator[Group]:
    with ExitStack() as stack:
        yield Group(stack)
