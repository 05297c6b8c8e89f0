"""How fast it goes right now, and lines about it. Pure arithmetic over snapshots; no terminal."""

from __future__ import annotations

import math
from collections import deque

from packcast.cli.report import count
from packcast.units import format_duration, format_exact_size, format_rate, format_size
from packcast.view import Snapshot, Start

WINDOW_S = 5.0


class RateWindow:
    """Bytes per second over the last few seconds: it falls to zero when nothing moves, where an
    average over the whole would hide a stall."""

    def __init__(self, now: float) -> None:
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def add(self, now: float, nbytes: int) -> float:
        """Take a sample; the rate over the window that ends with it."""
        samples = self._samples
        samples.append((now, nbytes))
        # The sample at the window's far end stays, or a slow poll would leave a window of one.
        while len(samples) > 2 and samples[1][0] <= now - WINDOW_S:
            samples.popleft()
        then, nbytes_then = samples[0]
        return max(0.0, (nbytes - nbytes_then) / (now - then)) if now > then else 0.0


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
    buffers = f"{start.num_buffers} buffers of {format_exact_size(start.buffer_size)}"
    staging = f"staging {format_exact_size(start.staging)}"
    pool = f", {start.pool} I/O threads" if verbose else ""
    return [
        whom,
        f"  {start.backend} on {start.device} ({start.reason}); {buffers}, {staging}{pool}",
    ]


def done_of(snapshot: Snapshot) -> str:
    """`3.2 of 8.0 GiB`, without a unit that is said twice."""
    done, total = format_size(snapshot.nbytes_done), format_size(snapshot.nbytes_total)
    number, _, unit = done.rpartition(" ")
    return f"{number if unit == total.rpartition(' ')[2] else done} of {total}"


def percent(snapshot: Snapshot) -> int:
    """Rounded down, so that 100 means all."""
    return 100 * snapshot.nbytes_done // snapshot.nbytes_total if snapshot.nbytes_total else 100


def time_left(snapshot: Snapshot, rate: float) -> str:
    """At the present rate; nothing while nothing moves."""
    left = snapshot.nbytes_total - snapshot.nbytes_done
    if rate <= 0 or left <= 0:
        return ""
    seconds = math.ceil(left / rate)
    return f"{seconds} s left" if seconds < 60 else f"{format_duration(seconds)} left"


def workers_line(workers: dict[int, int], total: int) -> str:
    """Many workers in one line: the slowest, the fastest, how many are through."""
    slowest = min(workers, key=lambda rank: workers[rank])
    fastest = max(workers, key=lambda rank: workers[rank])
    done = sum(nbytes >= total for nbytes in workers.values())
    return (
        f"{len(workers)} workers, {done} done; "
        f"slowest rank {slowest} at {_share(workers[slowest], total)}, "
        f"fastest rank {fastest} at {_share(workers[fastest], total)}"
    )


def _share(nbytes: int, total: int) -> str:
    return f"{100 * nbytes // total if total else 100} %"


def stages_line(rates: dict[str, float]) -> str:
    """`read 12.3, broadcast 12.1, write 9.80 GB/s`."""
    numbers = {stage: format_rate(rate).removesuffix(" GB/s") for stage, rate in rates.items()}
    return ", ".join(f"{stage} {number}" for stage, number in numbers.items()) + " GB/s"
