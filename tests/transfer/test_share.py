"""Claims about a rank's share of its host: memory to stage in, and threads or helpers for its I/O.

Decided from the offer and the machine; nothing is started here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from packcast.transfer import share
from packcast.transfer.share import helpers_pay, num_hands, staging_bound
from packcast.units import GIB
from tests.transfer.offers import OFFER, sidecar


def has_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(share.os, "sched_getaffinity", lambda _pid: set(range(count)))


@pytest.mark.parametrize(
    ("device", "cores", "ranks_on_host", "nbytes", "expected"),
    [
        pytest.param("cuda:1", 16, 2, GIB, True, id="all that it takes"),
        pytest.param("cpu", 16, 2, GIB, False, id="no GPU"),
        pytest.param("cuda:1", 15, 2, GIB, False, id="seven cores a rank"),
        pytest.param("cuda:1", 16, 2, GIB - 1, False, id="a little"),
    ],
)
def test_helpers_work_beside_a_gpu_with_eight_cores_a_rank_and_a_gibibyte(
    device: str,
    cores: int,
    ranks_on_host: int,
    nbytes: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_cores(monkeypatch, cores)
    place = replace(OFFER.place, device=device, ranks_on_host=ranks_on_host)
    offer = replace(OFFER, files=(sidecar("a", nbytes),), place=place)
    assert helpers_pay(offer) is expected


@pytest.mark.parametrize(
    ("cores", "sharing", "helpers", "expected"),
    [
        (1, 1, False, 2),
        (8, 2, False, 4),
        (64, 2, False, 16),
        (8, 1, True, 6),
        (64, 2, True, 16),
    ],
)
def test_their_number_is_a_share_of_the_cores_from_two_to_sixteen(
    cores: int, sharing: int, helpers: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_cores(monkeypatch, cores)
    assert num_hands(sharing, helpers=helpers) == expected


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
    monkeypatch.setattr(share, "available_nbytes", lambda: available)
    place = replace(OFFER.place, ranks_on_host=ranks_on_host)
    assert staging_bound(replace(OFFER, staging=GIB, place=place)) == expected
