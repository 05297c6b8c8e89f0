"""Never more than the rate allows and one chunk, by a clock that a test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcast.errors import TransferError
from packcast.packed.ratelimit import RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(0, 30)), min_size=1, max_size=20),
    st.floats(0.5, 50),
)
def test_in_any_length_of_time_no_more_goes_than_the_rate_allows_and_one_chunk(
    chunks: list[tuple[int, float]], rate: float
) -> None:
    clock = Clock()
    limit = RateLimit(rate, clock=clock)
    went = [(clock.now, 0)]
    for nbytes, busy_s in chunks:
        clock.now += busy_s  # what the loop does besides
        limit.take(nbytes, clock.pause)
        went.append((clock.now, nbytes))
    for i, (begin, _) in enumerate(went):
        for end in range(i + 1, len(went)):
            nbytes = [each for _, each in went[i + 1 : end + 1]]
            allowed = rate * (went[end][0] - begin) + (max(nbytes) if i else 0)
            assert sum(nbytes) <= allowed + 1e-6 * sum(nbytes)
    assert all(0 < each <= 0.2 for each in clock.pauses)


def test_who_is_slower_than_the_rate_never_pauses() -> None:
    clock = Clock()
    limit = RateLimit(10.0, clock=clock)
    for _ in range(10):
        clock.now += 1.01
        limit.take(10, clock.pause)
    assert clock.pauses == []


def test_being_late_once_is_made_up_for() -> None:
    clock = Clock()
    limit = RateLimit(10.0, clock=clock)
    for late_s in (0.0, 0.5, 0.0, 0.0):
        limit.take(10, clock.pause)
        clock.now += late_s
    assert clock.now == pytest.approx(104.0)


def test_a_failure_ends_the_pause() -> None:
    def fail(seconds: float) -> None:
        raise TransferError("lost rank 1")

    with pytest.raises(TransferError, match="lost rank 1"):
        RateLimit(1.0, clock=Clock()).take(1 << 30, fail)
