"""What a transfer waits on: workers that have not joined, then the rank and stage that hold it up.

Pure functions over what the view was told, and one tracker that is told the time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from packcast.cli.result import count
from packcast.units import format_countdown
from packcast.view import Joining, Snapshot, WorkerState

MAX_ROWS = 8
MAX_NAMED = 4
SHOW_AFTER_S = 2.0  # what holds it up for less changes with every look
_WINDOW_S = 3.0

# What a worker's loop waits for, as what the worker does.
_STATES = {
    "broadcast": "receiving",
    "d2h": "copying",
    "h2d": "copying",
    "read": "reading",
    "write": "writing",
    "verify": "comparing",
    "discard": "checking",
    "sync": "syncing",
}

HERE = -1  # in the place of a rank: the one that looks, a worker
Culprit = tuple[int | None, str]  # rank (None: the network) and stage


def joining_line(joining: Joining, now: float) -> str:
    """`2 of 11 workers, waiting for ranks 3, 7, 8, 9 and 5 more; 4:50 left`."""
    line = f"{joining.joined} of {count(joining.wanted, 'worker')}"
    if joining.joined >= joining.wanted:
        return f"{line} joined, preparing"
    left = f"{format_countdown(joining.deadline - now)} left"
    if not joining.missing:
        return f"{line}, waiting for {joining.wanted - joining.joined} more; {left}"
    named = ", ".join(map(str, joining.missing[:MAX_NAMED]))
    more = len(joining.missing) - MAX_NAMED
    ranks = f"rank{'s' * (len(joining.missing) > 1)} {named}" + f" and {more} more" * (more > 0)
    return f"{line}, waiting for {ranks}; {left}"


def state_of(worker: WorkerState, total: int) -> str:
    """What a worker does just now, in one word."""
    if worker.nbytes >= total and worker.stage != "sync":
        return "done"
    return _STATES.get(worker.stage, "")


def chosen_workers(workers: Mapping[int, WorkerState]) -> list[tuple[str, int]]:
    """The workers that get a row, each with what to say of it: all, or where they are many the
    slowest, the median and the fastest."""
    if len(workers) <= MAX_ROWS:
        return [("", rank) for rank in sorted(workers)]
    by_speed = sorted(workers, key=lambda rank: (workers[rank].nbytes, rank))
    return [
        ("slowest", by_speed[0]),
        ("median", by_speed[len(by_speed) // 2]),
        ("fastest", by_speed[-1]),
    ]


def slowest_of(workers: Mapping[int, WorkerState]) -> int | None:
    """The rank with the fewest bytes."""
    return min(workers, key=lambda rank: (workers[rank].nbytes, rank), default=None)


def culprit_of(snapshot: Snapshot) -> Culprit | None:
    """Who holds the transfer up at this moment; None where nobody does, or nobody knows.

    A worker that waits for its own disk or device, the slowest of them; else whoever sends, where
    the network has taken all that was read; else the network.
    """
    total = snapshot.nbytes_total
    busy = {
        rank: worker
        for rank, worker in snapshot.workers.items()
        if worker.stage == "sync"
        or (worker.nbytes < total and worker.stage not in ("", "broadcast"))
    }
    rank = slowest_of(busy)
    if rank is not None:
        return rank, busy[rank].stage
    if not snapshot.workers and snapshot.stage not in ("", "broadcast"):
        return HERE, snapshot.stage
    if not snapshot.workers or snapshot.nbytes_done >= total:
        return None
    read, sent = snapshot.stages.get("read", 0), snapshot.stages.get("broadcast", 0)
    if snapshot.stage == "read" and read <= sent and read < total:
        return 0, "read"
    return None, "network"


class Bottleneck:
    """Who holds a transfer up, and since when: what most looks of the last seconds found, since a
    loop that is looked at between two pieces seems to wait for others."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, Culprit | None]] = deque()
        self._culprit: Culprit | None = None
        self._since = 0.0

    def add(self, culprit: Culprit | None, now: float) -> None:
        """Take one look's answer."""
        self._looks.append((now, culprit))
        while self._looks[0][0] < now - _WINDOW_S:
            self._looks.popleft()
        most = Counter(found for _, found in self._looks).most_common(1)[0][0]
        if most != self._culprit:
            self._culprit = most
            self._since = next(when for when, found in self._looks if found == most)

    def line(self, hosts: Mapping[int, str], now: float) -> str | None:
        """`waiting on rank 1 (hostb): write, 12 s`; None while it is too early to say."""
        if self._culprit is None or now - self._since < SHOW_AFTER_S:
            return None
        rank, stage = self._culprit
        if rank is None:
            return "waiting on the network"
        if rank == HERE:
            return f"waiting on this host: {stage}, {now - self._since:.0f} s"
        host = f" ({hosts[rank]})" if rank in hosts else ""
        return f"waiting on rank {rank}{host}: {stage}, {now - self._since:.0f} s"
