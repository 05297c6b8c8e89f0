"""Measuring: a sweep of transfers beside baselines and the hardware's limits.

Imports no torch: the command line imports this for its options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packcast.bench.model import BenchSettings, BenchView

if TYPE_CHECKING:
    from packcast.launch.exit import ProcessExit


def run(settings: BenchSettings, view: BenchView, exit_handler: ProcessExit) -> int:
    """Take part in a bench; every rank calls this. See packcast/bench/measure.py."""
    from packcast.bench.measure import run as run_bench

    return run_bench(settings, view, exit_handler)
