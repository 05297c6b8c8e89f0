"""The summary of a successful transfer: what was sent, how fast and where. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from packcast.cli.result import count
from packcast.packed.counters import STAGES
from packcast.report import Report, ranks_text
from packcast.units import format_duration, format_size, format_speed

_MAX_LINES = 8  # about workers
_SHOWN_DIGITS = 16


def end_lines(report: Report) -> list[str]:
    """The lines of the summary."""
    what = f"{count(report.num_files, 'file')}, {format_size(report.nbytes)}"
    if report.is_sender and report.world_size:
        done = f"sent {what} to {count(report.world_size - 1, 'worker')}"
    else:
        done = f"received {what}"
    took = f"{format_duration(report.seconds)} at {format_speed(report.bytes_per_second)}"
    lines = [f"{done} in {took}", *_outcomes(report)]
    if report.total_seconds:
        lines.append(f"  {format_duration(report.total_seconds)} with start-up and end")
    rates = _stage_rates(report)
    if rates:
        stages = (f"{name} {format_speed(rate)}" for name, rate in rates.items())
        lines.append(f"  {', '.join(stages)}")
    slowest = _slowest(report)
    if slowest:
        lines.append(f"  {slowest}")
    if report.digest:
        lines.append(f"  digest of all files {report.digest[:_SHOWN_DIGITS]}")
    return lines


def _stage_rates(report: Report) -> dict[str, float]:
    """Rates of this rank's stages; for stages that only workers have, the slowest worker's."""
    rates = {name: stage.bytes_per_second for name, stage in report.stages.items() if stage.nbytes}
    theirs: dict[str, float] = {}
    for facts in report.workers.values():
        stages = facts.get("stages")
        for name, stage in stages.items() if isinstance(stages, dict) else ():
            nbytes, seconds = (stage.get(key) for key in ("nbytes", "seconds"))
            if isinstance(nbytes, int) and nbytes and isinstance(seconds, int | float) and seconds:
                theirs[name] = min(theirs.get(name, nbytes / seconds), nbytes / seconds)
    both = theirs | rates
    return {name: both[name] for name in STAGES if name in both}


def _outcomes(report: Report) -> list[str]:
    """What each worker did with the bytes, one line for equal outcomes."""
    by_outcome: dict[str, list[int]] = {}
    for rank, facts in sorted(report.workers.items()):
        by_outcome.setdefault(outcome_of(facts), []).append(rank)
    if not report.is_sender:
        return [f"  {outcome}" for outcome in by_outcome if outcome]
    hosts = {it.rank: it.host for it in report.ranks}
    lines = []
    for outcome, ranks in by_outcome.items():
        host = f" ({hosts[ranks[0]]})" if len(ranks) == 1 and hosts.get(ranks[0]) else ""
        if outcome:
            lines.append(f"  {ranks_text(ranks)}{host}: {outcome}")
    if len(lines) > _MAX_LINES:
        more = len(lines) - _MAX_LINES + 1
        lines[_MAX_LINES - 1 :] = [f"  and {more} more; --json has all"]
    return lines


def outcome_of(facts: Mapping[str, object]) -> str:
    """What one worker did with the bytes, from its result."""
    target, sink = facts.get("target"), facts.get("sink")
    if sink == "write":
        if facts.get("wrote") is False and int(str(facts.get("sharing", 1))) > 1:
            return f"written to {target}, a share of it"
        if facts.get("wrote") is False:
            return f"checked; another rank has written {target}"
        also = f", manifest {facts['manifest']}" if facts.get("manifest") else ""
        return f"written to {target}{also}"
    if sink == "verify":
        copy = facts.get("checkpoint")
        return f"identical to {copy}" if facts.get("equal") else f"differs from {copy}"
    if sink == "discard":
        return "checked and dropped; nothing written"
    return "received as tensors" if sink == "tensors" else ""


def _slowest(report: Report) -> str:
    """The slowest of several workers, and the stage that it waited for most."""
    seconds = {
        rank: float(took)
        for rank, facts in report.workers.items()
        if isinstance(took := facts.get("seconds"), int | float)
    }
    if len(seconds) < 2:
        return ""
    rank = max(seconds, key=lambda rank: seconds[rank])
    host = next((f" ({it.host})" for it in report.ranks if it.rank == rank), "")
    text = f"slowest rank {rank}{host}: {format_duration(seconds[rank])}"
    stages = report.workers[rank].get("stages")
    waited = {
        name: float(stage["waiting_seconds"])
        for name, stage in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(stage, dict) and isinstance(stage.get("waiting_seconds"), int | float)
    }
    most = max(waited, key=lambda name: waited[name], default=None)
    if most is None or waited[most] < 0.1 * seconds[rank]:
        return text
    return f"{text}, of which {format_duration(waited[most])} waiting on {most}"
