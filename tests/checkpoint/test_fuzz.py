"""A part of what `python -m tests.checkpoint.fuzz` does, the same one every time."""

from __future__ import annotations

import pytest

from tests.checkpoint import fuzz


@pytest.mark.parametrize("seed", range(4))
def test_headers_changed_at_random_are_read_as_safetensors_reads_them(seed: int) -> None:
    outcomes = fuzz.run(5_000, seed)
    assert outcomes["refused by both"] > 1000
    assert outcomes["accepted by both, as usual"] > 100
    assert outcomes["accepted by both, as any JSON"] > 100
