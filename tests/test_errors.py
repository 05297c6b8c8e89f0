"""What errors say in a sentence."""

from __future__ import annotations

import pytest

from packcast.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("NCCL is broken\nC++ stack follows"), "NCCL is broken"),
        (RuntimeError("\n  late"), "late"),
        (RuntimeError(""), "RuntimeError"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line
