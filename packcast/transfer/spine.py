"""The whole story of a transfer, in the order in which it happens: `send` beside `receive`.

Each step is one call; what a step does is told where it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from packcast.errors import PackcastError, TransferError
from packcast.group.addresses import interface_of, interface_towards
from packcast.group.hub import Hub
from packcast.group.leave import WayOut
from packcast.group.line import Line
from packcast.group.member import Member
from packcast.group.store import connect_store, serve_store
from packcast.io.landing import Sink
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.localcopy import local_copy
from packcast.io.sinks.shelf import Shelf
from packcast.io.sinks.tensors import TensorSink
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.io.source import FileReader
from packcast.packed.plan import check_ring
from packcast.report import Report
from packcast.settings import Settings, fill_in
from packcast.transfer.agreement import (
    check_device,
    make_offers,
    rank_of,
    same_files_as_offered,
)
from packcast.transfer.go import Go
from packcast.transfer.moving import Mover
from packcast.transfer.offer import Offer
from packcast.transfer.results import (
    agreed_digests,
    facts_of,
    failures_of,
    make_report,
    proof_of,
    published_by,
    rank_reports,
    since,
)
from packcast.transfer.seat import Seat, take_seat
from packcast.transfer.stall import StallWatch
from packcast.transfer.telling import start_of, told_who_joins, worker_states
from packcast.view import View

# Of a device and how many bytes of finished tensors may wait: where tensors are received.
MakeShelf = Callable[[str, int], Shelf]

_SLOWEST_DISK = 20e6  # bytes per second
_PATIENCE_S = 30.0  # for the peers' last words, once their work is done


def run(
    settings: Settings,
    view: View,
    leaver: WayOut,
    *,
    call: int = 0,
    make_shelf: MakeShelf | None = None,
) -> Report:
    """Take part in one transfer, as `packcast send` or `packcast recv` does. Every rank calls it.

    Returns this rank's report, whose exit code is 6 where a comparison found a difference. Raises
    PackcastError after telling the other ranks; a verdict that comes from them, a lost peer or a
    stall goes to `leaver`, from another thread, since a collective may be hanging. `call` counts
    the transfers of one launch, alike on all ranks. A worker with `make_shelf` receives tensors.
    """
    if settings.command == "send":
        check_ring(settings.buffer_size, settings.num_buffers, settings.staging)
    view.phase("join")
    seat = take_seat(settings, view, leaver, call=call)
    leaver.on_leave(lambda: seat.channel.abort(leaver.error or TransferError("it left")))
    try:
        if isinstance(seat.channel, Hub):
            return send(settings, seat, seat.channel, view, leaver)
        return receive(settings, seat, seat.channel, view, leaver, make_shelf)
    except PackcastError as error:
        seat.channel.abort(error)
        raise
    finally:
        seat.leave()


def send(settings: Settings, seat: Seat, hub: Hub, view: View, leaver: WayOut) -> Report:
    """The sender's side."""
    checkpoint, files = seat.checkpoint, seat.files
    assert checkpoint is not None, "the sender has a checkpoint"
    for warning in checkpoint.warnings:
        view.warn(warning)

    members = hub.join(seat.expected, settings.join_timeout_s, told_who_joins(settings, seat, view))
    seat.have_joined()
    offers = make_offers(settings, checkpoint, files, members, members[seat.launch.rank])
    offer = offers[seat.launch.rank]

    view.phase("offer")
    workers = [rank for rank in offers if rank != offer.rank]
    hub.broadcast(offer.to_json())
    for rank in workers:
        hub.send(rank, offers[rank].place.to_json())
    reader = FileReader(files, checkpoint.files)
    mover = Mover(offer, offer.chunks(), seat.transfer_id, reader=reader, sink=None)
    leaver.on_abandon(mover.abandon)
    mover.read_ahead()
    mover.arm(hub)
    sums = _await_ready(hub, offer, settings.join_timeout_s)

    view.phase("start")
    host = hub.host_met()
    store, port = serve_store(host, settings.join_timeout_s)
    hub.broadcast(Go(host, port, sums).to_json())
    hosts = {rank_of(member): member.host for member in members}
    view.started(
        start_of(offer, is_sender=True, hosts=hosts), lambda: mover.snapshot(worker_states(hub))
    )

    with StallWatch(mover, hub, leaver, settings.stall_timeout_s):
        view.phase("data")
        moved = mover.move(
            store,
            interface_of(host),
            hub,
            stall_timeout_s=settings.stall_timeout_s,
            sums=sums,
            survives=leaver.survives,
        )
        hub.gather("MOVED", None)  # the stall watch is its bound
    hub.broadcast({"kind": "CLOSE"})
    view.phase("finish")
    close = mover.begin_close()
    proofs = hub.gather("PROVED", _finish_limit_s(settings, offer))
    seconds = since(moved.began)
    closed = close()
    digests = agreed_digests(offer, moved.digests, proofs)

    view.phase("publish")
    leaver.shield()
    hub.committed()
    hub.broadcast({"kind": "COMMIT"})
    published = hub.gather("PUBLISHED", _finish_limit_s(settings, offer))
    hub.broadcast({"kind": "DONE"})
    failures = failures_of(workers, proofs, published, hub.lost)
    hub.close()

    view.phase("done")
    return make_report(
        settings,
        offer,
        moved,
        mover.counters,
        seconds=seconds,
        ranks=rank_reports(members, offers, offer.rank, failures),
        digests=digests,
        workers={rank: facts_of(proofs[rank], published.get(rank)) for rank in workers},
        warnings=checkpoint.warnings,
        failures=failures,
        ends_cleanly=closed,
    )


def receive(
    settings: Settings,
    seat: Seat,
    line: Line,
    view: View,
    leaver: WayOut,
    make_shelf: MakeShelf | None,
) -> Report:
    """A worker's side, which may read too."""
    patience_s = settings.join_timeout_s + _PATIENCE_S
    view.note(f"joined {line.sender.label}, waiting for the other workers")
    me, world_size = line.await_joined(patience_s)
    seat.have_joined()

    view.phase("offer")
    offer = _expect_offer(line, me, world_size, patience_s)
    chunks = offer.chunks()
    sink = _make_sink(settings, seat, offer, me, make_shelf)
    leaver.on_leave(sink.abort, sink.left if isinstance(sink, WriteSink) else None)
    with _undone_on_error(sink, line):
        sink.prepare()
        mover = Mover(offer, chunks, seat.transfer_id, reader=_own_reader(seat, offer), sink=sink)
        leaver.on_abandon(mover.abandon)
        mover.read_ahead()
        mover.arm(line)
        line.set_progress(mover.heartbeat)
        line.send({"kind": "READY", "plan": offer.plan, "sums": mover.needs_sums})

        go = Go.from_json(line.expect("GO", patience_s))
        view.phase("start")
        host = line.host_told(go.host)
        store = connect_store(host, go.port, settings.join_timeout_s)
        view.started(start_of(offer, is_sender=False), lambda: mover.snapshot({}))

        with StallWatch(mover, line, leaver, settings.stall_timeout_s):
            view.phase("data")
            moved = mover.move(
                store,
                interface_towards(host),
                line,
                stall_timeout_s=settings.stall_timeout_s,
                sums=go.sums,
                survives=leaver.survives,
            )
            line.send({"kind": "MOVED"})
            line.expect("CLOSE", None)
        view.phase("finish")
        close = mover.begin_close()
        mover.counters.standing = "sync"
        sink.finish()
        mover.counters.standing = None
        seconds = since(moved.began)
        proof = proof_of(offer, moved, mover.counters, sink, seconds)
        line.send(proof)
        closed = close()
        line.expect("COMMIT", _finish_limit_s(settings, offer))

        view.phase("publish")
        leaver.shield()
        line.committed()
        fault = _publish(sink)
        line.send(published_by(sink, fault))
    with suppress(TransferError):  # published is published, whatever became of the sender
        line.expect("DONE", _PATIENCE_S)
    if line.lost:
        view.warn(f"{line.lost}, after this rank had published")
    line.close()
    for note in sink.notes:
        view.warn(f"rank {offer.rank}: {note}")

    view.phase("done")
    rank = offer.rank
    failures = failures_of([rank], {rank: proof}, {rank: published_by(sink, fault)}, {})
    return make_report(
        settings,
        offer,
        moved,
        mover.counters,
        seconds=seconds,
        ranks=rank_reports([line.sender, me], {rank: offer}, offer.readers[0], failures),
        digests=agreed_digests(offer, moved.digests, {rank: proof}),
        workers={rank: sink.result()},
        warnings=sink.notes,
        failures=failures,
        ends_cleanly=closed,
        comparison=sink.comparison() if isinstance(sink, VerifySink) else None,
    )


def _expect_offer(line: Line, me: Member, world_size: int, timeout_s: float) -> Offer:
    offer = Offer.from_json(line.expect("OFFER", timeout_s), line.expect("PLACE", timeout_s))
    if (offer.rank, offer.world_size) != (me.rank, world_size):
        raise TransferError("the sender's offer is for another rank or group")
    check_device(offer)
    return offer


def _make_sink(
    settings: Settings, seat: Seat, offer: Offer, me: Member, make_shelf: MakeShelf | None
) -> Sink:
    if make_shelf is not None:
        return TensorSink(offer.files, make_shelf(offer.device, offer.staging))
    if settings.target is None:
        return DiscardSink()
    where = fill_in(
        settings.target, rank=offer.rank, local_rank=seat.launch.local_rank, host=me.host
    )
    if settings.sink == "verify":
        # In a single launch this rank has the sender's own options.
        selection = bool(settings.include or settings.exclude)
        return VerifySink(local_copy(Path(where), offer.files), offer.files, selection=selection)
    return WriteSink(
        Path(where),
        offer.files,
        transfer_id=seat.transfer_id,
        force=settings.force,
        in_place=settings.in_place,
    )


def _own_reader(seat: Seat, offer: Offer) -> FileReader | None:
    """What this worker reads itself, where the sender chose it as a reader."""
    if offer.rank not in offer.readers:
        return None
    if seat.checkpoint is None:
        raise TransferError("the sender chose this rank as a reader, but it has no checkpoint")
    return FileReader(same_files_as_offered(seat.checkpoint, offer), seat.checkpoint.files)


@contextmanager
def _undone_on_error(sink: Sink, line: Line) -> Iterator[None]:
    """Whatever goes wrong: the others hear of it first, then nothing is left behind here."""
    try:
        yield
    except BaseException as error:
        line.abort(error if isinstance(error, PackcastError) else PackcastError(repr(error)))
        sink.abort()
        raise


def _finish_limit_s(settings: Settings, offer: Offer) -> float:
    """How long the slowest rank may take to make its copy durable, or to replace the old one.

    No byte is seen to move meanwhile, so this grows with the checkpoint instead.
    """
    return settings.stall_timeout_s + offer.nbytes / _SLOWEST_DISK


def _publish(sink: Sink) -> PackcastError | None:
    """After COMMIT a failure is this rank's own: it is reported, and stops nobody else."""
    try:
        sink.publish()
    except PackcastError as error:
        return error
    return None


def _await_ready(hub: Hub, offer: Offer, timeout_s: float) -> bool:
    """Every worker has reserved its space and buffers, and has made the same plan.

    Whether some worker needs the chunks' sums, since its bytes stay on the device.
    """
    answers = hub.gather("READY", timeout_s)
    for rank, ready in answers.items():
        if ready.get("plan") != offer.plan:
            raise TransferError(f"rank {rank} makes another plan of the offer")
    return any(ready.get("sums") is True for ready in answers.values())
