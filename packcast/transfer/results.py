"""The ranks' last messages, and the report made of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from pydantic import JsonValue

from packcast.comparison import Comparison
from packcast.control.channel import DIED_HINT
from packcast.control.rank_info import RankInfo
from packcast.errors import PackcastError, TransferError, VerificationError, error_from_code
from packcast.io.landing import Sink
from packcast.io.pool import pool_kind
from packcast.packed.counters import Counters
from packcast.report import RankReport, Report, StageReport, ranks_text
from packcast.settings import Settings
from packcast.transfer.data_plane import DataPhaseResult
from packcast.transfer.offer import Offer
from packcast.transfer.protocol import Done, Proved, Published, StageFigures

_MAX_SENTENCES = 8


def stage_reports(counters: Counters) -> dict[str, StageReport]:
    """Each stage's time from its first beginning to its last end, and the loop's waits for it."""
    return {
        stage: StageReport(
            total.nbytes, max(0.0, total.last_end - total.first_begin), total.waiting_s
        )
        for stage, total in counters.totals().items()
    }


def agreed_digests(
    offer: Offer, mine: list[str] | None, proofs: Mapping[int, Proved]
) -> dict[str, str]:
    """The digest of every file; TransferError unless it is the same on sender and workers."""
    digests, measure = mine, "the sender"
    for rank, proof in sorted(proofs.items()):
        theirs = proof.digests
        if theirs is None or len(theirs) != len(offer.files):
            raise TransferError(f"rank {rank} sent no digests of the {len(offer.files)} files")
        if digests is None:
            digests, measure = theirs, f"rank {rank}"
        for spec, one, other in zip(offer.files, digests, theirs, strict=True):
            if one != other:
                raise TransferError(f"{spec.name}: the bytes of rank {rank} differ from {measure}")
    assert digests is not None, "there is at least one worker"
    return {spec.name: digest for spec, digest in zip(offer.files, digests, strict=True)}


def proof_of(offer: Offer, moved: DataPhaseResult, sink: Sink, seconds: float) -> Proved:
    """This worker's PROVED, once its sink has finished."""
    return Proved(
        digests=moved.digests,
        seconds=seconds,
        stages={
            name: StageFigures(**asdict(stage))
            for name, stage in stage_reports(moved.counters).items()
        },
        peak_device_bytes=moved.peak_device_nbytes,
        pinned_bytes=moved.pinned_nbytes,
        device=offer.device,
        pool=pool_kind(),
        difference=str(sink.result().get("sentence") or "") or None,
    )


def published_by(sink: Sink, fault: PackcastError | None) -> Published:
    """This worker's PUBLISHED: what it has at the end, or why not."""
    result = _as_json(sink.result())
    assert isinstance(result, dict)
    return Published(
        result=result,
        error=fault.message if fault else None,
        hint=fault.hint if fault else None,
        code=fault.exit_code if fault else 0,
    )


def publish_copy(sink: Sink) -> Published:
    """After COMMIT a failure is this rank's own: it is reported, and stops no other rank."""
    try:
        sink.publish()
    except PackcastError as error:
        return published_by(sink, error)
    return published_by(sink, None)


def _as_json(value: object) -> JsonValue:
    """A sink's result as it travels; a path's bytes that are no text are escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_as_json(item) for item in value]
    assert value is None or isinstance(value, (bool, int, float))
    return value


def failures_of(
    workers: Sequence[int],
    proofs: Mapping[int, Proved],
    published: Mapping[int, Published],
    lost: Mapping[int, str],
    owners: Mapping[int, int] | None = None,
) -> dict[int, PackcastError]:
    """What went wrong on which worker, after the point of no return; empty if nothing did.

    `owners`: which other rank publishes a worker's copy, as in `hand_out_shares`.
    """
    failures: dict[int, PackcastError] = {}
    for rank in workers:
        last = published.get(rank)
        if last is None:
            sentence = lost.get(rank, "it disconnected before it published")
            failures[rank] = TransferError(sentence, hint=DIED_HINT if rank in lost else None)
        elif last.error or last.code:
            sentence = last.error or "it gave no reason"
            failures[rank] = error_from_code(
                last.code or TransferError.exit_code, sentence, last.hint
            )
        elif difference := proofs[rank].difference:
            failures[rank] = VerificationError(difference)
    for rank, owner in (owners or {}).items():
        if owner in failures:
            failures.setdefault(rank, failures[owner])
    return failures


def done_for(rank: int, owners: Mapping[int, int], failures: Mapping[int, PackcastError]) -> Done:
    """The last word to a worker; it knows of its own failure, but not of its owner's."""
    fault = failures.get(owners.get(rank, -1))
    if fault is None:
        return Done()
    return Done(code=fault.exit_code, error=fault.message, hint=fault.hint)


def failure_told_by(done: Done) -> PackcastError | None:
    """Why there is no copy, although this worker did its part."""
    return (
        error_from_code(done.code, done.error or "it gave no reason", done.hint)
        if done.code
        else None
    )


def facts_of(proof: Proved, published: Published | None) -> dict[str, object]:
    """A worker's own figures, for the sender's report."""
    facts = proof.model_dump(exclude={"digests", "difference"})
    return facts | (published.result if published else {})


def make_report(
    settings: Settings,
    offer: Offer,
    moved: DataPhaseResult,
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

    A worker that could not publish decides the exit code before one that found a difference.
    """
    worst = min(failures, key=lambda rank: (failures[rank].exit_code == 6, rank), default=None)
    exit_code = 0 if worst is None else failures[worst].exit_code
    sentences = _sentences(failures)
    done = [report.rank for report in ranks if report.role == "worker" and report.ok]
    if done and exit_code not in (0, VerificationError.exit_code):
        sentences.append(f"complete on {ranks_text(done)}")
    error = "; ".join(sentences)
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
        stages=stage_reports(moved.counters),
        peak_device_nbytes=moved.peak_device_nbytes,
        peak_pinned_nbytes=moved.pinned_nbytes,
        digests=dict(digests),
        workers=workers,
        comparison=comparison,
        warnings=tuple(warnings),
        ends_cleanly=ends_cleanly,
    )


def _sentences(failures: Mapping[int, PackcastError]) -> list[str]:
    """The failures' sentences, each with its ranks; one about a lost rank names it already."""
    ranks_by_sentence: dict[str, list[int]] = {}
    for rank, fault in failures.items():
        ranks_by_sentence.setdefault(fault.message, []).append(rank)
    sentences = [
        sentence if sentence.startswith("lost ") else f"{ranks_text(ranks)}: {sentence}"
        for sentence, ranks in ranks_by_sentence.items()
    ]
    more = len(sentences) - _MAX_SENTENCES
    return [*sentences[:_MAX_SENTENCES], f"and {more} more"] if more > 1 else sentences


def rank_reports(
    infos: Sequence[RankInfo],
    offers: Mapping[int, Offer],
    sender: int,
    failures: Mapping[int, PackcastError],
) -> list[RankReport]:
    """One line for each rank."""
    reports = []
    for info in infos:
        rank = info.known_rank
        failure = failures.get(rank)
        reports.append(
            RankReport(
                rank=rank,
                role="sender" if rank == sender else "worker",
                host=info.host,
                device=offers[rank].device if rank in offers else "",
                ok=failure is None,
                error=None if failure is None else failure.message,
            )
        )
    return reports
