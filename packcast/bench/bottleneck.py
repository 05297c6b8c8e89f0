"""Which stage held a run up: the counters of all ranks read together.

Pure functions. Each rank sees only what its own loop waited for, and behind a collective that may
be somebody else's trouble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from packcast.bench.model import RankRun
from packcast.packed.counters import Stage, StageTotal


def waiting_of(totals: Mapping[Stage, StageTotal]) -> dict[str, float]:
    """What one rank's loop waited for, in seconds by stage.

    Beside a GPU the loop runs ahead and meets only full staging, told as a wait for the copy to
    or from the device. Where broadcasts took longer than the copies, it was they who held it up.
    """
    waiting: dict[str, float] = {
        stage: total.waiting_s for stage, total in totals.items() if total.waiting_s > 0
    }
    broadcast_s = totals["broadcast"].busy_s if "broadcast" in totals else 0.0
    for copy in ("h2d", "d2h"):
        if copy in waiting and totals[copy].busy_s < broadcast_s:
            waiting["broadcast"] = waiting.get("broadcast", 0.0) + waiting.pop(copy)
    return waiting


def busy_of(totals: Mapping[Stage, StageTotal]) -> dict[str, float]:
    """Each stage from its first beginning to its last end, in seconds."""
    return {
        stage: max(0.0, total.last_end - total.first_begin)
        for stage, total in totals.items()
        if total.nbytes
    }


def lanes_of(totals: Mapping[Stage, StageTotal], seconds: float) -> dict[str, float]:
    """What one rank's lanes were busy with, for ways whose loop never waits beside a GPU.

    `totals` are of a pass like the one that took `seconds`, of which these are the same shares.
    """
    moved = {stage: total for stage, total in totals.items() if total.nbytes}
    if not moved:
        return {}
    end = max(total.last_end for total in moved.values())
    whole_s = end - min(total.first_begin for total in moved.values())
    if whole_s <= 0:
        return {}
    return {stage: seconds * min(1.0, total.busy_s / whole_s) for stage, total in moved.items()}


def settle_waiting(ranks: Sequence[RankRun]) -> tuple[RankRun, ...]:
    """The ranks of one run, with waits for each other told apart from the broadcast itself.

    A rank that is early waits inside the collective for the last one to come, who does not. So no
    rank waited longer for the broadcast proper than the one that waited least; what the others
    waited beyond that is on record on the late rank, under the stage that made it late.
    """
    if not any("broadcast" in part.waiting for part in ranks):
        return tuple(ranks)
    least = min(part.waiting.get("broadcast", 0.0) for part in ranks)
    return tuple(
        replace(part, waiting={**part.waiting, "broadcast": least})
        if "broadcast" in part.waiting
        else part
        for part in ranks
    )
