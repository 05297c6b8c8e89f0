"""A rank's share of its host: how much memory it pins, who does its I/O, and how many of them.

Decided from the offer and the machine alone; nothing is allocated or started here.
"""

from __future__ import annotations

import os

from packcast.io.memory import available_nbytes
from packcast.transfer.offer import Offer

_KEPT_PROCESSORS = 2  # of a rank's share: for its loop, and for what proves on a GPU
_MAX_IO_THREADS = 24  # more do not pay, with a GPU's link as the limit


def staging_bound(offer: Offer) -> int:
    """The offered staging, or less: a rank never pins more than its share of half the free memory.

    What a worker stages is its own business, so a large offer is cut down rather than refused.
    """
    available = available_nbytes()
    if available is None:
        return offer.staging
    return min(offer.staging, available // 2 // offer.assignment.ranks_on_host)


def num_io_threads(sharing: int) -> int:
    """How many threads read or write for this rank, of `sharing` on the host that do: its share of
    the processors, less those that its own threads keep busy, at least two."""
    share = len(os.sched_getaffinity(0)) // sharing
    return max(2, min(_MAX_IO_THREADS, share - _KEPT_PROCESSORS))
