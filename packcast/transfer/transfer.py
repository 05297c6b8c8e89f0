"""A whole transfer in the order in which it happens: `send` beside `receive`.

Each step is one call; its details are where it is defined. What comes before is in `run.py`.
"""

from __future__ import annotations

import time
from contextlib import suppress

from packcast.control.addresses import interface_of, interface_towards
from packcast.control.client import ControlClient
from packcast.control.messages import Commit
from packcast.control.server import ControlServer
from packcast.errors import TransferError
from packcast.io.landing import Sink
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.io.source import FileReader
from packcast.launch.store import join_served_store, serve_store
from packcast.report import Report
from packcast.settings import Settings
from packcast.transfer.agreement import (
    await_offer,
    await_ready,
    make_offers,
    send_offers,
)
from packcast.transfer.data_plane import DataPlane
from packcast.transfer.ends import MakeDestination, make_sink, own_reader, undone_on_error
from packcast.transfer.offer import Offer
from packcast.transfer.protocol import Close, Done, Go, Moved, Proved, Published, Ready
from packcast.transfer.results import (
    agreed_digests,
    done_for,
    facts_of,
    failure_told_by,
    failures_of,
    make_report,
    proof_of,
    publish_copy,
    published_by,
    rank_reports,
)
from packcast.transfer.session import Session
from packcast.transfer.shares import hand_out_shares, state_of_copy, take_share
from packcast.transfer.stall import StallWatch
from packcast.transfer.view_state import joining_updates, start_of, told_by_sender, worker_states

_SLOWEST_DISK = 5e6  # bytes per second
_PATIENCE_S = 30.0  # for the others' last messages, once their work is done


def send(session: Session, server: ControlServer) -> Report:
    """The sender's side."""
    settings, view, exit_handler = session.settings, session.view, session.exit_handler
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
    reader = FileReader(files, checkpoint.files)
    data_plane = _start_data_plane(session, offer, reader, sink=None)
    owners = hand_out_shares(server, infos, settings.join_timeout_s)
    sums = await_ready(server, offer, settings.join_timeout_s)

    view.phase("start")
    host = server.host_met()
    store, port = serve_store(host, settings.join_timeout_s, settings.port_range)
    server.broadcast(Go(host=host, port=port, sums=sums))
    view.started(
        start_of(
            offer,
            is_sender=True,
            hosts={info.known_rank: info.host for info in infos},
            is_low=fitted.is_low,
        ),
        lambda: data_plane.snapshot(worker_states(server)),
    )
    with StallWatch(data_plane, server, exit_handler, settings.stall_timeout_s):
        view.phase("data")
        moved = data_plane.move(
            store,
            interface_of(host),
            stall_timeout_s=settings.stall_timeout_s,
            sums=sums,
            max_rate=settings.max_rate,
        )
        server.gather(Moved, None)  # the stall watch is its bound
    server.broadcast(Close())

    view.phase("finish")
    close = data_plane.begin_close()
    proofs = server.gather(Proved, _finish_limit_s(settings, offer))
    seconds = time.perf_counter() - moved.began
    ends_cleanly = close()
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
        seconds=seconds,
        ranks=rank_reports(infos, offers, offer.rank, failures),
        digests=digests,
        workers={rank: facts_of(proofs[rank], published.get(rank)) for rank in workers},
        warnings=(*checkpoint.warnings, *fitted.notes),
        failures=failures,
        ends_cleanly=ends_cleanly,
    )


def receive(
    session: Session, client: ControlClient, make_destination: MakeDestination | None
) -> Report:
    """A worker's side; it may be a reader too."""
    settings, view, exit_handler = session.settings, session.view, session.exit_handler
    patience_s = settings.join_timeout_s + _PATIENCE_S
    view.note(f"joined {client.sender.label}, waiting for the other workers")
    me, world_size = client.await_joined(patience_s, told_by_sender(view))
    session.have_joined()

    view.phase("offer")
    offer = await_offer(client, me.known_rank, world_size, patience_s)
    sink = make_sink(session, offer, me, make_destination)
    exit_handler.on_leave(sink.abort, sink.left if isinstance(sink, WriteSink) else None)
    with undone_on_error(sink, client):
        sink.prepare()
        take_share(sink, client, patience_s)
        reader = own_reader(session, offer)
        data_plane = _start_data_plane(session, offer, reader, sink)
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
                stall_timeout_s=settings.stall_timeout_s,
                sums=go.sums,
            )
            client.send(Moved())
            client.expect(Close, None)

        view.phase("finish")
        close = data_plane.begin_close()
        seconds = moved.ended - moved.began + _finish(sink, data_plane)
        proof = proof_of(offer, moved, sink, seconds)
        client.send(proof)
        ends_cleanly = close()
        client.expect(Commit, _finish_limit_s(settings, offer))

        view.phase("publish")
        exit_handler.shield()
        client.commit()
        published = publish_copy(sink)
        client.send(published)
    published = _await_last_word(client, sink, published, _finish_limit_s(settings, offer))
    if client.lost:
        view.warn(f"{client.lost}, {state_of_copy(sink)}")
    client.close()
    for note in sink.notes:
        view.warn(f"rank {offer.rank}: {note}")

    view.phase("done")
    failures = failures_of([offer.rank], {offer.rank: proof}, {offer.rank: published}, {})
    return make_report(
        settings,
        offer,
        moved,
        seconds=seconds,
        ranks=rank_reports([client.sender, me], {offer.rank: offer}, offer.readers[0], failures),
        digests=agreed_digests(offer, moved.digests, {offer.rank: proof}),
        workers={offer.rank: sink.result()},
        warnings=sink.notes,
        failures=failures,
        ends_cleanly=ends_cleanly,
        comparison=sink.comparison() if isinstance(sink, VerifySink) else None,
    )


def _start_data_plane(
    session: Session, offer: Offer, reader: FileReader | None, sink: Sink | None
) -> DataPlane:
    """It reads ahead from now on, and the heartbeats carry its progress."""
    channel, exit_handler = session.channel, session.exit_handler
    data_plane = DataPlane(
        offer,
        offer.chunks(),
        channel,
        channel.transfer_id,
        reader=reader,
        sink=sink,
        survives=exit_handler.survives,
    )
    exit_handler.on_abandon(data_plane.abandon)
    channel.follow(data_plane.position, data_plane.progress)
    data_plane.read_ahead()
    return data_plane


def _finish(sink: Sink, data_plane: DataPlane) -> float:
    """Make the copy durable; how long that took, without waiting for the other ranks."""
    data_plane.counters.standing = "sync"
    began = time.perf_counter()
    sink.finish()
    data_plane.counters.standing = None
    return time.perf_counter() - began


def _await_last_word(
    client: ControlClient, sink: Sink, published: Published, limit_s: float
) -> Published:
    """What this rank has in the end: another rank may have to publish its copy, within a limit."""
    patience_s = _PATIENCE_S
    if isinstance(sink, WriteSink) and not sink.wrote:
        patience_s += limit_s
    with suppress(TransferError):  # published is published, even if the sender is lost
        done = client.expect(Done, patience_s)
        if done.code and not published.code:
            return published_by(sink, failure_told_by(done))
    return published


def _finish_limit_s(settings: Settings, offer: Offer) -> float:
    """How long the slowest rank may take to make its copy durable, or to replace the old one.

    No byte moves meanwhile, so this grows with the checkpoint instead.
    """
    return settings.stall_timeout_s + offer.nbytes / _SLOWEST_DISK
