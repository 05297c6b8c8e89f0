"""What ranks tell each other at the end, and the report made of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from packcast.comparison import Comparison
from packcast.errors import PackcastError, TransferError, VerificationError
from packcast.group.member import Member
from packcast.group.wire import error_of
from packcast.io.landing import Sink
from packcast.io.pool import pool_kind
from packcast.packed.counters import Counters
from packcast.report import RankReport, Report, StageReport, ranks_text
from packcast.settings import Settings
from packcast.transfer.agreement import rank_of
from packcast.transfer.moving import Moved
from packcast.transfer.offer import Offer

_MAX_SENTENCES = 8
_MAX_SENTENCE = 2000  # characters; a tensor's name may be absurdly long


def stage_reports(counters: Counters) -> dict[str, StageReport]:
    """Each stage from its first beginning to its last end, and the loop's waiting for it."""
    return {
        stage: StageReport(
            total.nbytes, max(0.0, total.last_end - total.first_begin), total.waiting_s
        )
        for stage, total in counters.totals().items()
    }


def agreed_digests(
    offer: Offer, mine: list[str] | None, proofs: Mapping[int, Mapping[str, object]]
) -> dict[str, str]:
    """The digest of every file, which sender and workers must all have found to be the same."""
    digests, measure = mine, "the sender"
    for rank, proof in sorted(proofs.items()):
        theirs = proof.get("digests")
        if not isinstance(theirs, list) or [type(it) for it in theirs] != [str] * len(offer.files):
            raise TransferError(f"rank {rank} sent no digests of the {len(offer.files)} files")
        if digests is None:
            digests, measure = [str(digest) for digest in theirs], f"rank {rank}"
        for spec, one, other in zip(offer.files, digests, theirs, strict=True):
            if one != other:
                raise TransferError(f"{spec.name}: rank {rank} has other bytes than {measure}")
    assert digests is not None, "there is at least one worker"
    return {spec.name: digest for spec, digest in zip(offer.files, digests, strict=True)}


def proof_of(
    offer: Offer, moved: Moved, counters: Counters, sink: Sink, seconds: float
) -> dict[str, object]:
    """PROVED: every byte was received, proven, and made durable, compared or dropped."""
    return {
        "kind": "PROVED",
        "digests": moved.digests,
        "seconds": seconds,
        "stages": {
            name: {
                "nbytes": stage.nbytes,
                "seconds": stage.seconds,
                "waiting_seconds": stage.waiting_seconds,
            }
            for name, stage in stage_reports(counters).items()
        },
        "peak_device_bytes": moved.peak_device_nbytes,
        "pinned_bytes": moved.pinned_nbytes,
        "device": offer.device,
        "pool": pool_kind(),
        "difference": str(sink.result().get("sentence") or "")[:_MAX_SENTENCE] or None,
    }


def published_by(sink: Sink, fault: PackcastError | None) -> dict[str, object]:
    """PUBLISHED: what this worker has at the end, or why not."""
    return {
        "kind": "PUBLISHED",
        "result": sink.result(),
        "error": fault.message if fault else None,
        "hint": fault.hint if fault else None,
        "code": fault.exit_code if fault else 0,
    }


def failures_of(
    workers: Sequence[int],
    proofs: Mapping[int, Mapping[str, object]],
    published: Mapping[int, Mapping[str, object]],
    lost: Mapping[int, str],
) -> dict[int, PackcastError]:
    """What went wrong on which worker, after the point of no return; empty if nothing did."""
    failures: dict[int, PackcastError] = {}
    for rank in workers:
        last = published.get(rank)
        if last is None:
            failures[rank] = TransferError(lost.get(rank, "it left before it said PUBLISHED"))
        elif last.get("error") or last.get("code"):
            said = {"message": last.get("error")} | {k: last.get(k) for k in ("code", "hint")}
            failures[rank] = error_of(said)
        elif proofs[rank].get("difference"):
            failures[rank] = VerificationError(str(proofs[rank]["difference"]))
    return failures


def facts_of(
    proof: Mapping[str, object], published: Mapping[str, object] | None
) -> dict[str, object]:
    """What a worker told of itself, for the sender's report."""
    names = ("device", "pool", "seconds", "stages", "peak_device_bytes", "pinned_bytes")
    facts = {name: proof.get(name) for name in names}
    result = (published or {}).get("result")
    return facts | (result if isinstance(result, dict) else {})


def make_report(
    settings: Settings,
    offer: Offer,
    moved: Moved,
    counters: Counters,
    *,
    seconds: float,
    ranks: Sequence[RankReport],
    digests: Mapping[str, str],
    workers: Mapping[int, Mapping[str, object]],
    warnings: Sequence[str],
    failures: Mapping[int, PackcastError],
    ends_cleanly: bool,
    comparison: Comparison | None = None,
) -> Report:
    """This rank's report of a transfer that reached its end.

    A worker that could not publish weighs more than one that found a difference.
    """
    worst = min(failures, key=lambda rank: (failures[rank].exit_code == 6, rank), default=None)
    exit_code = 0 if worst is None else failures[worst].exit_code
    said = _said(failures)
    done = [report.rank for report in ranks if report.role == "worker" and report.ok]
    if done and exit_code not in (0, VerificationError.exit_code):
        said.append(f"complete on {ranks_text(done)}")
    error = "; ".join(said)
    return Report(
        command=settings.command,
        rank=offer.rank,
        is_sender=offer.rank == offer.readers[0],
        ok=exit_code == 0,
        exit_code=exit_code,
        error=error or None,
        hint=None if worst is None else failures[worst].hint,
        checkpoint=None if settings.checkpoint is None else os.path.abspath(settings.checkpoint),
        num_files=len(offer.files),
        num_tensors=offer.num_tensors,
        nbytes=offer.nbytes,
        backend=offer.backend,
        reason=offer.reason,
        world_size=offer.world_size,
        ranks=tuple(ranks),
        buffer_size=offer.buffer_size,
        num_buffers=offer.num_buffers,
        staging=offer.staging,
        pool=pool_kind(),
        seconds=seconds,
        stages=stage_reports(counters),
        peak_device_nbytes=moved.peak_device_nbytes,
        peak_pinned_nbytes=moved.pinned_nbytes,
        digests=dict(digests),
        workers=workers,
        comparison=comparison,
        warnings=tuple(warnings),
        ends_cleanly=ends_cleanly,
    )


def _said(failures: Mapping[int, PackcastError]) -> list[str]:
    """The failures' sentences, each with its ranks; one about a lost rank names it already."""
    by_sentence: dict[str, list[int]] = {}
    for rank, fault in failures.items():
        by_sentence.setdefault(fault.message, []).append(rank)
    said = [
        sentence if sentence.startswith("lost ") else f"{ranks_text(ranks)}: {sentence}"
        for sentence, ranks in by_sentence.items()
    ]
    more = len(said) - _MAX_SENTENCES
    return [*said[:_MAX_SENTENCES], f"and {more} more"] if more > 1 else said


def rank_reports(
    members: Sequence[Member],
    offers: Mapping[int, Offer],
    sender: int,
    failures: Mapping[int, PackcastError],
) -> list[RankReport]:
    """One line for each rank; `failures` says what went wrong on some."""
    return [
        RankReport(
            rank=rank_of(member),
            role="sender" if rank_of(member) == sender else "worker",
            host=member.host,
            device=offers[rank_of(member)].device if rank_of(member) in offers else "",
            ok=rank_of(member) not in failures,
            error=failures[rank_of(member)].message if rank_of(member) in failures else None,
        )
        for member in members
    ]


def since(began: float) -> float:
    """Seconds from `began`, by the clock that `Moved.began` was read from."""
    return time.perf_counter() - began
