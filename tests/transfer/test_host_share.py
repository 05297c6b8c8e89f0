"""Claims about a rank's share of its host: memory to stage in, and threads for its I/O.

Decided from the offer and the machine; nothing is started here.
"""

from __future__ import annotations

import pytest

from packcast.transfer import host_share
from packcast.transfer.host_share import num_io_threads, staging_bound
from packcast.units import GIB
from tests.transfer.offers import OFFER, assigned, changed


def has_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(host_share.os, "sched_getaffinity", lambda _pid: set(range(count)))


@pytest.mark.parametrize(
    ("cores", "sharing", "expected"),
    [(1, 1, 2), (2, 1, 2), (8, 2, 2), (32, 2, 14), (32, 1, 24), (64, 2, 24)],
)
def test_io_threads_are_a_share_of_the_cores_less_two_for_the_rank_itself(
    cores: int, sharing: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_cores(monkeypatch, cores)
    assert num_io_threads(sharing) == expected


@pytest.mark.parametrize(
    ("available", "ranks_on_host", "expected"),
    [
        (64 * GIB, 1, GIB),
        (GIB, 1, GIB // 2),
        (4 * GIB, 8, GIB // 4),
        pytest.param(None, 8, GIB, id="a kernel that does not say"),
    ],
)
def test_staging_is_cut_down_to_a_share_of_half_the_memory_that_is_free(
    available: int | None, ranks_on_host: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_share, "available_nbytes", lambda: available)
    assignment = assigned(3, ranks_on_host=ranks_on_host)
    offer = changed(OFFER, staging=GIB, assignment=assignment)
    assert staging_bound(offer) == expected
    both = expected if expected == GIB else expected // 2  # that reads and writes
    assert staging_bound(offer, 2) == both
