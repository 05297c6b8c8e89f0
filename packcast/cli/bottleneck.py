"""The bottleneck of a transfer: workers that have not joined, then the slowest rank and stage."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from packcast.cli.result import count
from packcast.units import format_countdown
from packcast.view import Joining, Snapshot, WorkerState

MAX_ROWS = 8
MAX_NAMED = 4
SHOW_AFTER_S = 2.0  # shorter bottlenecks change too often to show
_WINDOW_S = 3.0

RECEIVING = "receiving"
# The stage that a worker's loop waits for, and the state shown for it.
_STATES = {
    "connect": "connecting",
    "broadcast": RECEIVING,
    "d2h": "copying",
    "h2d": "copying",
    "read": "reading",
    "write": "writing",
    "verify": "comparing",
    "discard": "checking",
    "sync": "syncing",
}

HERE = -1  # instead of a rank: this process
Culprit = tuple[int | None, str]  # rank and stage; the rank is None for these stages:
_LIMITS = {"limit": "--max-rate", "broadcast": "the broadcast between ranks"}
_ON_OTHERS = {  # on a worker
    "bytes": "waiting for bytes from the other ranks",
    "others": "complete here, waiting for the other workers",
}


def joining_line(joining: Joining, now: float) -> str:
    """`2 of 11 workers joined; waiting for ranks 3, 7, 8, 9 and 5 more, up to 4:50`.

    Where ranks are not known yet: `2 of 11 workers joined, the last on node7; waiting up to 4:50`.
    """
    line = f"{joining.joined} of {count(joining.wanted, 'worker')} joined"
    if joining.joined >= joining.wanted:
        return f"{line}, preparing"
    limit = f"up to {format_countdown(joining.deadline - now)}"
    if not joining.missing:
        newest = f", the last on {joining.newest_host}" if joining.newest_host else ""
        return f"{line}{newest}; waiting {limit}"
    num_missing = joining.wanted - joining.joined
    ranks = ", ".join(map(str, joining.missing[:MAX_NAMED]))
    if num_missing > MAX_NAMED:
        ranks += f" and {num_missing - MAX_NAMED} more"
    return f"{line}; waiting for rank{'s' * (num_missing > 1)} {ranks}, {limit}"


def is_done(worker: WorkerState, total: int) -> bool:
    """Whether the worker has received every byte and made it durable."""
    return worker.nbytes >= total and worker.stage != "sync"


def chosen_workers(workers: Mapping[int, WorkerState]) -> list[tuple[str, int]]:
    """(label, rank) of the workers that get a row: all, or slowest, median and fastest."""
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
    """The bottleneck in one snapshot; None if there is none or it is unknown.

    In this order: --max-rate; the slowest worker that waits for its own disk or device; this
    process; on the sender the broadcast; on a complete worker the other workers.
    """
    total = snapshot.nbytes_total
    if snapshot.stage == "limit":
        return None, "limit"
    busy = {
        rank: worker
        for rank, worker in snapshot.workers.items()
        if worker.stage not in ("", "broadcast") and not is_done(worker, total)
    }
    rank = slowest_of(busy)
    if rank is not None:
        return rank, busy[rank].stage
    if snapshot.stage not in ("", "broadcast"):
        return HERE, snapshot.stage
    if snapshot.workers:
        return (None, "broadcast") if snapshot.nbytes_done < total else None
    return (None, "others") if snapshot.stages and snapshot.nbytes_done >= total else None


class Bottleneck:
    """The bottleneck and since when it lasts: the most frequent one of the last seconds, because
    a single snapshot between two pieces can be wrong."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Culprit | None, Snapshot]] = deque()
        self._culprit: Culprit | None = None
        self._since = 0.0

    def add(self, snapshot: Snapshot, now: float) -> None:
        """Add one snapshot."""
        culprit = culprit_of(snapshot)
        if culprit is None and snapshot.stages and not snapshot.workers and self._samples:
            has_moved = snapshot.stages != self._samples[-1][2].stages
            culprit = None if has_moved else (None, "bytes")
        self._samples.append((now, culprit, snapshot))
        while self._samples[0][0] < now - _WINDOW_S:
            self._samples.popleft()
        most = Counter(found for _, found, _ in self._samples).most_common(1)[0][0]
        rank = None if most is None else most[0]
        if rank in snapshot.workers and is_done(snapshot.workers[rank], snapshot.nbytes_total):
            most = None
        if most != self._culprit:
            self._culprit = most
            self._since = next((when for when, found, _ in self._samples if found == most), now)

    def state(self, rank: int) -> str:
        """The worker's most frequent state of the last seconds, in one word."""
        newest = self._samples[-1][2]
        if is_done(newest.workers[rank], newest.nbytes_total):
            return "done"
        stages = (look.workers[rank].stage for _, _, look in self._samples if rank in look.workers)
        return _STATES.get(Counter(stages).most_common(1)[0][0], "")

    def line(self, hosts: Mapping[int, str], now: float) -> str | None:
        """`waiting on rank 1 (hostb): write, 12 s`; None if it has not lasted long enough."""
        if self._culprit is None or now - self._since < SHOW_AFTER_S:
            return None
        rank, stage = self._culprit
        took = f"{now - self._since:.0f} s"
        if rank is None:
            limit = _LIMITS.get(stage)
            return f"limited by {limit}" if limit else f"{_ON_OTHERS[stage]}, {took}"
        host = f" ({hosts[rank]})" if rank in hosts else ""
        who = "this host" if rank == HERE else f"rank {rank}{host}"
        return f"waiting on {who}: {stage}, {took}"
