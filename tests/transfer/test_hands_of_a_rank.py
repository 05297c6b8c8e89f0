"""Claims about who reads, checks and writes on a rank: threads or helper processes, and how many.

Decided from the offer and the cores; nothing is started here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from packcast.transfer import moving
from packcast.transfer.moving import num_hands
from packcast.units import GIB
from tests.transfer.offers import OFFER, sidecar


def has_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(moving.os, "sched_getaffinity", lambda _pid: set(range(count)))


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
    assert moving._helpers_pay(offer) is expected


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
