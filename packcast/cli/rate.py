"""Current rates, time left and the start lines. Pure functions of snapshots."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from packcast.cli.result import count
from packcast.units import (
    format_buffers,
    format_countdown,
    format_exact_size,
    format_rate,
    format_size,
)
from packcast.view import Snapshot, Start

WINDOW_S = 5.0
LONG_WINDOW_S = 30.0  # for the time left, so that a short pause hardly changes it


class RateWindow:
    """Bytes per second over a moving window, which shows a stall. Starts with the first byte."""

    def __init__(self, now: float, window_s: float = WINDOW_S) -> None:
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])
        self._window_s = window_s

    def add(self, now: float, nbytes: int) -> float:
        """Add a sample; returns the rate over the window that ends with it."""
        samples = self._samples
        if nbytes == 0:  # do not count connecting and start-up
            samples.clear()
        samples.append((now, nbytes))
        # Keep the sample at the window's start, or a slow poll would leave only one.
        while len(samples) > 2 and samples[1][0] <= now - self._window_s:
            samples.popleft()
        then, nbytes_then = samples[0]
        return max(0.0, (nbytes - nbytes_then) / (now - then)) if now > then else 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second right now, of the whole, each stage and each worker; `lasting` is that of
    the whole over a longer time."""

    whole: float
    lasting: float
    stages: dict[str, float]
    workers: dict[int, float]


class Meter:
    """Rate windows for the total, and for each stage and worker."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._lasting = RateWindow(now, LONG_WINDOW_S)
        self._windows: dict[str | int, RateWindow] = {}

    def rates(self, snapshot: Snapshot, now: float) -> Rates:
        """Add one sample to all windows."""

        def rate(name: str | int, nbytes: int) -> float:
            return self._windows.setdefault(name, RateWindow(self._began)).add(now, nbytes)

        return Rates(
            whole=rate("", snapshot.nbytes_done),
            lasting=self._lasting.add(now, snapshot.nbytes_done),
            stages={stage: rate(stage, nbytes) for stage, nbytes in snapshot.stages.items()},
            workers={rank: rate(rank, it.nbytes) for rank, it in snapshot.workers.items()},
        )


def start_lines(start: Start, *, verbose: bool = False) -> list[str]:
    """What goes, to whom, over what and why; then the buffers, and which I/O threads."""
    files = count(start.num_files, "file")
    what = f"{files}, {count(start.num_tensors, 'tensor')}, {format_size(start.nbytes)}"
    others = start.world_size - 1
    if start.is_sender:
        whom = f"sending {what} to {count(others, 'worker')}"
        if len(start.readers) > 1:
            whom += f" from {len(start.readers)} readers"
    else:
        whom = f"receiving {what} as rank {start.rank} of {start.world_size}"
    buffers = format_buffers(start.num_buffers, start.buffer_size)
    if start.device != "cpu":  # there the buffers are the staging too
        buffers += f", staging {format_exact_size(start.staging)}"
    if start.is_low:
        buffers += " (low on memory)"
    pool = f", {start.pool} I/O threads" if verbose else ""
    return [
        whom,
        f"  {start.backend} on {start.device} ({start.reason}); {buffers}{pool}",
    ]


def done_of(snapshot: Snapshot) -> str:
    """`3.2 of 8.0 GiB`, with the unit once if both have it."""
    done, total = format_size(snapshot.nbytes_done), format_size(snapshot.nbytes_total)
    number, _, unit = done.rpartition(" ")
    return f"{number if unit == total.rpartition(' ')[2] else done} of {total}"


def percent(snapshot: Snapshot) -> int:
    """Rounded down, so that 100 means all."""
    return 100 * snapshot.nbytes_done // snapshot.nbytes_total if snapshot.nbytes_total else 100


def time_left(snapshot: Snapshot, rates: Rates) -> str:
    """At the rate of the last half minute; empty during a stall."""
    left = snapshot.nbytes_total - snapshot.nbytes_done
    if left <= 0 or not rates.whole or not rates.lasting:
        return ""
    return f"{format_countdown(left / rates.lasting)} left"


def stages_line(rates: dict[str, float]) -> str:
    """`read 12.3, broadcast 12.1, write 9.80 GB/s`; in MB/s if all are slow."""
    if max(rates.values(), default=0.0) < 0.1e9:
        numbers = {stage: f"{rate / 1e6:.1f}" for stage, rate in rates.items()}
        unit = "MB/s"
    else:
        numbers = {stage: format_rate(rate).removesuffix(" GB/s") for stage, rate in rates.items()}
        unit = "GB/s"
    return ", ".join(f"{stage} {number}" for stage, number in numbers.items()) + f" {unit}"
