"""Measuring: a sweep of transfers beside baselines and the hardware's limits.

Imports no torch here: the command line looks in for what needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packcast.bench.model import BenchSettings, BenchView

if TYPE_CHECKING:
    from packcast.group.leave import Leaver


def run(settings: BenchSettings, view: BenchView, leaver: Leaver) -> int:
    """Take part in a bench; every rank calls this. See packcast/bench/session.py."""
    from packcast.bench.session import run as run_bench

    return run_bench(settings, view, leaver)
