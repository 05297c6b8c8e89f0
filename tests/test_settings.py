"""What a transfer's settings come to where nobody gave them."""

from __future__ import annotations

import pytest

from packcast.settings import fitting_buffer_size


@pytest.mark.parametrize(
    ("nbytes", "mib"),
    [
        (0, 16),
        (64 << 20, 16),
        ((64 << 20) + 1, 32),
        (128 << 20, 32),
        ((128 << 20) + 1, 64),
        (1 << 40, 64),
    ],
)
def test_larger_checkpoints_get_larger_buffers_up_to_a_size(nbytes: int, mib: int) -> None:
    assert fitting_buffer_size(nbytes) == mib << 20
