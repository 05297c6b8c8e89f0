"""Abandoned collectives, kept alive with their tensors and groups until they complete.

gloo's threads use the tensors until then, and a group's destructor waits for its collectives.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Work

    from packcast.packed.chain import PieceWork

_kept: list[tuple[Work | PieceWork, tuple[object, ...]]] = []


def keep(work: Work | PieceWork, *used: object) -> None:
    """Keep the work and what it uses until it completes, times out or its peer goes."""
    _kept.append((work, used))


def release_ended() -> None:
    """Release what has completed."""
    _kept[:] = [entry for entry in _kept if not entry[0].is_completed()]


@atexit.register
def _leak_the_rest() -> None:
    """At exit, leak what is left: a destructor would wait for it, and gloo's thread would abort
    the process when it frees a tensor after the interpreter has ended."""
    for entry in _kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(entry))
