"""A rank's share of its host's memory and processors. Allocates and starts nothing."""

from __future__ import annotations

import os

from packcast.io.memory import available_nbytes
from packcast.transfer.offer import Offer

_KEPT_PROCESSORS = 2  # of a rank's share: for its loop, and for verification on a GPU
_MAX_IO_THREADS = 24  # more do not pay, with a GPU's link as the limit


def staging_bound(offer: Offer) -> int:
    """The offered staging, or less: a rank pins at most its share of half the free memory."""
    available = available_nbytes()
    if available is None:
        return offer.staging
    return min(offer.staging, available // 2 // offer.assignment.ranks_on_host)


def num_io_threads(sharing: int) -> int:
    """How many I/O threads this rank has, if `sharing` ranks of the host do I/O.

    Its share of the processors, less those that its own threads keep busy; at least two.
    """
    share = len(os.sched_getaffinity(0)) // sharing
    return max(2, min(_MAX_IO_THREADS, share - _KEPT_PROCESSORS))
