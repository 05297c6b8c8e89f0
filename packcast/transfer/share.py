"""A rank's share of its host: how much memory it pins, who does its I/O, and how many of them.

Decided from the offer and the machine alone; nothing is allocated or started here.
"""

from __future__ import annotations

import os

import torch

from packcast.ends.memory import available_nbytes
from packcast.transfer.offer import Offer
from packcast.units import GIB

_MAX_HANDS = 16
# Below that a few threads do as well as processes, which take a moment to start.
_MIN_HELPER_CORES = 8
_MIN_HELPER_NBYTES = GIB
_KEPT_CORES = 2  # of each rank's share: helpers must not push its own threads aside


def staging_bound(offer: Offer) -> int:
    """The offered staging, or less: a rank never pins more than its share of half the free memory.

    What a worker stages is its own business, so a large offer is cut down rather than refused.
    """
    available = available_nbytes()
    if available is None:
        return offer.staging
    return min(offer.staging, available // 2 // offer.place.ranks_on_host)


def helpers_pay(offer: Offer) -> bool:
    """Whether processes are to read, check and write instead of threads: this is the one place.

    Beside a GPU copies run by themselves, so what is left of the loop and of many threads' calls
    is bound by the interpreter's lock; on a CPU ring the broadcast is what takes the time.
    """
    cores = len(os.sched_getaffinity(0)) // offer.place.ranks_on_host
    return (
        torch.device(offer.device).type == "cuda"
        and cores >= _MIN_HELPER_CORES
        and offer.nbytes >= _MIN_HELPER_NBYTES
    )


def num_hands(sharing: int, *, helpers: bool = False) -> int:
    """How many threads do the I/O, here or in helpers: a share of the cores, at least two."""
    cores = len(os.sched_getaffinity(0)) // sharing
    return max(2, min(_MAX_HANDS, cores - _KEPT_CORES if helpers else cores))
