"""Starts the I/O threads for some work: the compiled ones where they can be had, else Python's."""

from __future__ import annotations

import os

from packcast.errors import TransferError, UsageError
from packcast.io import native
from packcast.io.threads import ThreadPool
from packcast.io.work import Pool, Work

CLOSE_LIMIT_S = 1.0  # for I/O threads at the end: after a failure one may be stuck in a system call
_CHOICE = "PACKCAST_POOL"


def pool_kind() -> str:
    """`native` or `python`: the I/O threads of this process.

    Raises UsageError if PACKCAST_POOL names a pool that is missing."""
    choice = os.environ.get(_CHOICE, "auto")
    if choice not in ("auto", "native", "python"):
        raise UsageError(f"{_CHOICE} is {choice!r}", hint="say native, python or auto")
    found = native.installed()
    if choice == "native" and isinstance(found, str):
        raise UsageError(f"{_CHOICE} is native, but there is no native pool: {found}")
    return "python" if choice == "python" or isinstance(found, str) else "native"


def start_pool(work: Work, num_threads: int) -> Pool:
    """Start the I/O threads; they wait for units to be allowed. Raises TransferError if the system
    cannot start them."""
    library = native.installed()
    try:
        if pool_kind() == "native" and not isinstance(library, str):
            return native.NativePool(work, num_threads, library)
        return ThreadPool(work, num_threads)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TransferError(f"cannot start {num_threads} I/O threads: {reason}") from error
