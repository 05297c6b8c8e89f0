"""Collectives that were given up before their end, kept with all that they use until they end.

Until then gloo's threads read and write their tensors, and a group's destructor waits for them.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Work

_kept: list[tuple[Work, tuple[object, ...]]] = []


def keep(work: Work, *used: object) -> None:
    """Keep the work, its tensor and its group, until it ends by itself, its timeout or a peer."""
    _kept.append((work, used))


def release_ended() -> None:
    """Let go of what was kept and has ended."""
    _kept[:] = [entry for entry in _kept if not entry[0].is_completed()]


@atexit.register
def _leave_for_good() -> None:
    """The interpreter must not destroy, and so wait for, what is still kept at its end.

    The tensor neither: gloo's thread would meet the ended interpreter, and abort the process.
    """
    for entry in _kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(entry))
