"""The whole story of a transfer, in the order in which it happens: `send` beside `receive`.

Each step is one call; what a step does is told where it lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from packcast.control.addresses import interface_of, interface_towards
from packcast.control.client import ControlClient
from packcast.control.messages import Commit
from packcast.control.rank_info import RankInfo
from packcast.control.server import ControlServer
from packcast.errors import PackcastError, TransferError
from packcast.io.landing import Sink
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.localcopy import local_copy
from packcast.io.sinks.tensor_destination import TensorDestination
from packcast.io.sinks.tensors import TensorSink
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.io.source import FileReader
from packcast.launch.exit import ExitHandler
from packcast.launch.store import join_served_store, serve_store
from packcast.packed.plan import check_ring
from packcast.report import Report
from packcast.settings import Settings, fill_in
from packcast.transfer.agreement import (
    await_offer,
    make_offers,
    rank_of,
    same_files_as_offered,
    send_offers,
)
from packcast.transfer.data_plane import DataPlane
from packcast.transfer.offer import Offer, Selection
from packcast.transfer.protocol import Close, Done, Go, Moved, Proved, Published, Ready
from packcast.transfer.results import (
    agreed_digests,
    done_for,
    facts_of,
    failure_told_by,
    failures_of,
    make_report,
    proof_of,
    published_by,
    rank_reports,
    since,
)
from packcast.transfer.session import Session, open_session
from packcast.transfer.sharing import hand_out_shares, state_of_copy, take_share
from packcast.transfer.stall import StallWatch
from packcast.transfer.view_state import joining_updates, start_of, told_by_sender, worker_states
from packcast.view import View

# Of a device and how many bytes of finished tensors may wait: where tensors are received.
MakeDestination = Callable[[str, int], TensorDestination]

_SLOWEST_DISK = 5e6  # bytes per second
_DEVICE_START_S = 30.0  # how long CUDA and NCCL may hold the interpreter
_PATIENCE_S = 30.0  # for the others' last words, once their work is done


def run(
    settings: Settings,
    view: View,
    exit_handler: ExitHandler,
    *,
    call: int = 0,
    make_destination: MakeDestination | None = None,
) -> Report:
    """Take part in one transfer, as `packcast send` or `packcast recv` does. Every rank calls it.

    Returns this rank's report, whose exit code is 6 where a comparison found a difference. Raises
    PackcastError after telling the other ranks; a failure that comes from them, a lost rank or a
    stall goes to `exit_handler`, from another thread, since a collective may be hanging. `call`
    counts the transfers of one launch, alike on all ranks. A worker with `make_destination`
    receives tensors.
    """
    if settings.command == "send":
        check_ring(settings.buffer_size, settings.num_buffers, settings.staging)
    view.phase("join")
    session = open_session(settings, view, exit_handler, call=call)
    exit_handler.on_leave(
        lambda: session.channel.fail(exit_handler.error or TransferError("it disconnected"))
    )
    try:
        if isinstance(session.channel, ControlServer):
            return send(settings, session, session.channel, view, exit_handler)
        return receive(settings, session, session.channel, view, exit_handler, make_destination)
    except PackcastError as error:
        session.channel.fail(error)
        raise
    finally:
        session.leave()


def send(
    settings: Settings,
    session: Session,
    server: ControlServer,
    view: View,
    exit_handler: ExitHandler,
) -> Report:
    """The sender's side."""
    checkpoint, files = session.checkpoint, session.files
    assert checkpoint is not None, "the sender has a checkpoint"
    for warning in checkpoint.warnings:
        view.warn(warning)

    infos = server.join(settings.join_timeout_s, joining_updates(settings, server, view))
    session.have_joined()
    offers, fitted = make_offers(settings, checkpoint, files, infos, infos[session.launch.rank])
    offer = offers[session.launch.rank]
    for note in fitted.notes:
        view.warn(note)

    view.phase("offer")
    workers = send_offers(server, offers, offer.rank)
    _allow_device_start(server, offer)
    reader = FileReader(files, checkpoint.files)
    data_plane = DataPlane(offer, offer.chunks(), session.transfer_id, reader=reader, sink=None)
    exit_handler.on_abandon(data_plane.abandon)
    server.follow(data_plane.position, data_plane.progress)
    data_plane.read_ahead()
    owners = hand_out_shares(server, infos, settings.join_timeout_s)
    sums = _await_ready(server, offer, settings.join_timeout_s)

    view.phase("start")
    host = server.host_met()
    store, port = serve_store(host, settings.join_timeout_s, settings.port_range)
    server.broadcast(Go(host=host, port=port, sums=sums))
    hosts = {rank_of(info): info.host for info in infos}
    view.started(
        start_of(offer, is_sender=True, hosts=hosts, is_low=fitted.is_low),
        lambda: data_plane.snapshot(worker_states(server)),
    )

    with StallWatch(data_plane, server, exit_handler, settings.stall_timeout_s):
        view.phase("data")
        moved = data_plane.move(
            store,
            interface_of(host),
            server,
            stall_timeout_s=settings.stall_timeout_s,
            sums=sums,
            survives=exit_handler.survives,
            max_rate=settings.max_rate,
        )
        server.gather(Moved, None)  # the stall watch is its bound
    server.broadcast(Close())
    view.phase("finish")
    close = data_plane.begin_close()
    proofs = server.gather(Proved, _finish_limit_s(settings, offer))
    seconds = since(moved.began)
    closed = close()
    digests = agreed_digests(offer, moved.digests, proofs)

    view.phase("publish")
    exit_handler.shield()
    server.commit()
    server.broadcast(Commit())
    published = server.gather(Published, _finish_limit_s(settings, offer))
    failures = failures_of(workers, proofs, published, server.lost, owners)
    for rank in workers:
        server.send(rank, done_for(rank, owners, failures))
    server.close()

    view.phase("done")
    return make_report(
        settings,
        offer,
        moved,
        data_plane.counters,
        seconds=seconds,
        ranks=rank_reports(infos, offers, offer.rank, failures),
        digests=digests,
        workers={rank: facts_of(proofs[rank], published.get(rank)) for rank in workers},
        warnings=(*checkpoint.warnings, *fitted.notes),
        failures=failures,
        ends_cleanly=closed,
    )


def receive(
    settings: Settings,
    session: Session,
    client: ControlClient,
    view: View,
    exit_handler: ExitHandler,
    make_destination: MakeDestination | None,
) -> Report:
    """A worker's side, which may read too."""
    patience_s = settings.join_timeout_s + _PATIENCE_S
    view.note(f"joined {client.sender.label}, waiting for the other workers")
    me, world_size = client.await_joined(patience_s, told_by_sender(view))
    session.have_joined()

    view.phase("offer")
    offer = await_offer(client, rank_of(me), world_size, patience_s)
    _allow_device_start(client, offer)
    chunks = offer.chunks()
    sink = _make_sink(settings, session, offer, me, make_destination)
    exit_handler.on_leave(sink.abort, sink.left if isinstance(sink, WriteSink) else None)
    with _undone_on_error(sink, client):
        sink.prepare()
        take_share(sink, client, patience_s)
        data_plane = DataPlane(
            offer, chunks, session.transfer_id, reader=_own_reader(session, offer), sink=sink
        )
        exit_handler.on_abandon(data_plane.abandon)
        client.follow(data_plane.position, data_plane.progress)
        data_plane.read_ahead()
        client.send(Ready(plan=offer.plan, sums=data_plane.needs_sums))

        go = client.expect(Go, patience_s)
        view.phase("start")
        host = client.host_told(go.host)
        store = join_served_store(host, go.port, settings.join_timeout_s)
        view.started(start_of(offer, is_sender=False), lambda: data_plane.snapshot({}))

        with StallWatch(data_plane, client, exit_handler, settings.stall_timeout_s):
            view.phase("data")
            moved = data_plane.move(
                store,
                interface_towards(host),
                client,
                stall_timeout_s=settings.stall_timeout_s,
                sums=go.sums,
                survives=exit_handler.survives,
            )
            client.send(Moved())
            client.expect(Close, None)
        view.phase("finish")
        close = data_plane.begin_close()
        data_plane.counters.standing = "sync"
        synced_from = time.perf_counter()
        sink.finish()
        data_plane.counters.standing = None
        seconds = moved.ended - moved.began + since(synced_from)  # not of waiting for the others
        proof = proof_of(offer, moved, data_plane.counters, sink, seconds)
        client.send(proof)
        closed = close()
        client.expect(Commit, _finish_limit_s(settings, offer))

        view.phase("publish")
        exit_handler.shield()
        client.commit()
        fault = _publish(sink)
        client.send(published_by(sink, fault))
    patience_s = _PATIENCE_S
    if isinstance(sink, WriteSink) and not sink.wrote:
        patience_s += _finish_limit_s(settings, offer)  # for who publishes it
    with suppress(TransferError):  # published is published, whatever became of the sender
        fault = fault or failure_told_by(client.expect(Done, patience_s))
    if client.lost:
        view.warn(f"{client.lost}, {state_of_copy(sink)}")
    client.close()
    for note in sink.notes:
        view.warn(f"rank {offer.rank}: {note}")

    view.phase("done")
    rank = offer.rank
    failures = failures_of([rank], {rank: proof}, {rank: published_by(sink, fault)}, {})
    return make_report(
        settings,
        offer,
        moved,
        data_plane.counters,
        seconds=seconds,
        ranks=rank_reports([client.sender, me], {rank: offer}, offer.readers[0], failures),
        digests=agreed_digests(offer, moved.digests, {rank: proof}),
        workers={rank: sink.result()},
        warnings=sink.notes,
        failures=failures,
        ends_cleanly=closed,
        comparison=sink.comparison() if isinstance(sink, VerifySink) else None,
    )


def _make_sink(
    settings: Settings,
    session: Session,
    offer: Offer,
    me: RankInfo,
    make_destination: MakeDestination | None,
) -> Sink:
    if make_destination is not None:
        return TensorSink(offer.files, make_destination(offer.device, offer.staging))
    if settings.target is None:
        return DiscardSink()
    where = fill_in(
        settings.target, rank=offer.rank, local_rank=session.launch.local_rank, host=me.host
    )
    if settings.sink == "verify":
        selection = offer.selection != Selection((), ())
        return VerifySink(local_copy(Path(where), offer.files), offer.files, selection=selection)
    return WriteSink(
        Path(where),
        offer.files,
        transfer_id=session.transfer_id,
        force=settings.force,
        in_place=settings.in_place,
    )


def _own_reader(session: Session, offer: Offer) -> FileReader | None:
    """What this worker reads itself, where the sender chose it as a reader."""
    if offer.rank not in offer.readers:
        return None
    if session.checkpoint is None:
        raise TransferError("the sender chose this rank as a reader, but it has no checkpoint")
    return FileReader(same_files_as_offered(session.checkpoint, offer), session.checkpoint.files)


@contextmanager
def _undone_on_error(sink: Sink, client: ControlClient) -> Iterator[None]:
    """Whatever goes wrong: the others hear of it first, then nothing is left behind here."""
    try:
        yield
    except BaseException as error:
        client.fail(error if isinstance(error, PackcastError) else PackcastError(repr(error)))
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


def _allow_device_start(channel: ControlServer | ControlClient, offer: Offer) -> None:
    """Until the first broadcast CUDA and NCCL may hold the interpreter, which is no death."""
    if offer.backend == "nccl":
        channel.be_patient(_DEVICE_START_S)


def _await_ready(server: ControlServer, offer: Offer, timeout_s: float) -> bool:
    """Every worker has reserved its space and buffers, and has made the same plan.

    Whether some worker needs the chunks' sums, since its bytes stay on the device.
    """
    answers = server.gather(Ready, timeout_s)
    for rank, ready in answers.items():
        if ready.plan != offer.plan:
            raise TransferError(f"rank {rank} makes another plan of the offer")
    return any(ready.sums for ready in answers.values())
