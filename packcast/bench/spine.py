"""A whole bench on one rank, in the order in which it happens: join, settle, work, leave.

The sender leads; every rank, the sender too, does its part.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from packcast.bench.bench_rank import BenchRank
from packcast.bench.lead import Lead
from packcast.bench.messages import Begin, Did, Do, Left
from packcast.bench.model import BenchSettings, BenchView
from packcast.bench.team import Team
from packcast.control.client import ControlClient
from packcast.control.frames import Progress
from packcast.control.messages import Commit
from packcast.control.server import ControlServer
from packcast.errors import (
    PackcastError,
    RendezvousError,
    TransferError,
    UsageError,
    VerificationError,
)
from packcast.group.addresses import interface_towards
from packcast.group.defaultgroup import open_default_group
from packcast.group.devices import Assignment, assign_devices
from packcast.group.launch import detect_launch
from packcast.group.leave import Leaver
from packcast.group.processgroup import begin_close, open_process_group
from packcast.group.rank_info import RankInfo
from packcast.group.store import connect_store, serve_store
from packcast.packed.plan import check_buffers
from packcast.settings import Settings
from packcast.transfer.agreement import await_offer, rank_of
from packcast.transfer.seat import Seat, take_seat
from packcast.transfer.stall import StallWatch
from packcast.view import View

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PATIENCE_S = 30.0
_DEVICE_START_S = 30.0  # how long CUDA and NCCL may hold the interpreter
_CLOSE_LIMIT_S = 15.0
_FAILURE_WAIT_S = 5.0
# A backstop only, as in a transfer.
_GROUP_TIMEOUT_S = 24 * 3600.0


def run(settings: BenchSettings, view: BenchView, leaver: Leaver) -> int:
    """Take part in one bench; every rank that a launcher started calls it, with the same settings.

    Returns the exit code, the same on all ranks: 0, 5 where no row could be measured, 6 where
    bytes were wrong. Raises PackcastError after telling the other ranks; a lost rank or a stall
    ends the process through `leaver`. Files that it made are removed however it ends. Only the
    sender's view is told anything.
    """
    for buffer_size in settings.buffer_sizes:
        for num_buffers in settings.num_buffers:
            check_buffers(buffer_size, num_buffers)
    if detect_launch(os.environ).kind == "none":
        raise UsageError(
            "a bench needs at least two ranks", hint="start them with --nproc 2, torchrun or srun"
        )
    seat = take_seat(_as_transfer(settings), View(), leaver, call=0)
    leaver.on_leave(lambda: seat.channel.fail(leaver.error or TransferError("it left")))
    try:
        if isinstance(seat.channel, ControlServer):
            return _lead(settings, seat, seat.channel, view, leaver)
        return _follow(settings, seat, seat.channel, leaver)
    except PackcastError as error:
        seat.channel.fail(error)
        raise
    except RuntimeError as error:  # torch's own, of a collective or a copy
        cause = seat.channel.wait_failure(_FAILURE_WAIT_S) or TransferError(
            f"the bench broke: {(str(error).splitlines() or ['?'])[0]}"
        )
        seat.channel.fail(cause)
        raise cause from error
    finally:
        seat.leave()


def _lead(
    settings: BenchSettings, seat: Seat, server: ControlServer, view: BenchView, leaver: Leaver
) -> int:
    infos = server.join(settings.join_timeout_s, lambda *_: None)
    seat.have_joined()
    assignment = assign_devices(infos, settings.backend)
    if assignment.loud:
        view.warn(f"{assignment.backend}: {assignment.reason}")
    host = server.host_met()
    store, port = serve_store(host, settings.join_timeout_s)
    begin = _begin_message(settings, infos, assignment, seat, (host, port))
    server.broadcast(begin)
    bench_rank = _open_bench_rank(settings, seat, begin, seat.launch.rank, host, store)
    lead = Lead(settings, server, bench_rank, infos, _as_transfer(settings), view)
    leaver.on_leave(lead.tell_partial)
    leaver.on_leave(bench_rank.abandon)
    server.follow(bench_rank.position, lambda: Progress(moved=bench_rank.moved()))
    try:
        with StallWatch(bench_rank, server, leaver, settings.stall_timeout_s):
            lead.run()
            server.broadcast(Do(step="end"))
            _close_group(bench_rank.team)
            server.gather(Did, None)
    finally:
        bench_rank.abandon()
    code = _exit_code(lead)
    leaver.shield()
    server.commit()
    server.broadcast(Commit(code=code))
    server.gather(Left, _PATIENCE_S)
    server.close()
    return code


def _follow(settings: BenchSettings, seat: Seat, client: ControlClient, leaver: Leaver) -> int:
    patience_s = settings.join_timeout_s + _PATIENCE_S
    me, _ = client.await_joined(patience_s)
    seat.have_joined()
    begin = client.expect(Begin, patience_s)
    if begin.settings != _digest(settings):
        raise RendezvousError(
            f"{me.label} was started with other options than the sender, {client.sender.label}"
        )
    host = client.host_told(begin.host)
    store = connect_store(host, begin.port, settings.join_timeout_s)
    bench_rank = _open_bench_rank(settings, seat, begin, rank_of(me), host, store)
    leaver.on_leave(bench_rank.abandon)
    client.follow(bench_rank.position, lambda: Progress(moved=bench_rank.moved()))
    team = bench_rank.team
    try:
        with StallWatch(bench_rank, client, leaver, settings.stall_timeout_s):
            while (order := client.expect(Do, None)).step != "end":
                if order.step == "offer":
                    bench_rank.take_offer(await_offer(client, team.rank, team.world_size, None))
                    client.send(Did())
                else:
                    client.send(Did(answer=bench_rank.do(order.as_order())))
            _close_group(bench_rank.team)
            client.send(Did())
            committed = client.expect(Commit, None)
    finally:
        bench_rank.abandon()
    leaver.shield()
    client.commit()
    client.send(Left())
    client.close()
    return committed.code


def _as_transfer(settings: BenchSettings) -> Settings:
    """What a transfer with these settings would be: for joining, and for offers."""
    return Settings(
        command="send",
        checkpoint=settings.checkpoint,
        buffer_size=settings.buffer_sizes[0],
        num_buffers=settings.num_buffers[0],
        staging=settings.staging,
        backend=settings.backend,
        device=settings.device,
        port=settings.port,
        token=settings.token,
        join_timeout_s=settings.join_timeout_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        stall_timeout_s=settings.stall_timeout_s,
    )


def _digest(settings: BenchSettings) -> str:
    """Equal on two ranks iff they were asked for the same; where files lie may differ."""
    asked = (
        settings.shapes,
        settings.size,
        settings.sources,
        settings.sinks,
        settings.readers,
        settings.buffer_sizes,
        settings.num_buffers,
        settings.runs,
        settings.warmup,
        settings.checkpoint is None,
        (settings.cold, settings.check, settings.baselines, settings.limits, settings.staging),
    )
    return xxhash.xxh3_128_hexdigest(repr(asked).encode())


def _begin_message(
    settings: BenchSettings,
    infos: tuple[RankInfo, ...],
    assignment: Assignment,
    seat: Seat,
    address: tuple[str, int],
) -> Begin:
    """What every rank needs to know before there is a group."""
    boots = list(dict.fromkeys(info.boot_id for info in infos))
    return Begin(
        settings=_digest(settings),
        hosts=[boots.index(info.boot_id) for info in infos],
        devices=[assignment.devices[rank] for rank in range(len(infos))],
        backend=assignment.backend,
        sender=seat.launch.rank,
        host=address[0],
        port=address[1],
    )


def _open_bench_rank(
    settings: BenchSettings, seat: Seat, begin: Begin, rank: int, host: str, store: Store
) -> BenchRank:
    """Make the process group, which waits for all ranks, and this rank's part."""
    device = torch.device(begin.devices[rank])
    if begin.backend == "nccl":
        seat.channel.be_patient(_DEVICE_START_S)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place: dict[str, Any] = {
        "rank": rank,
        "world_size": len(begin.hosts),
        "store": store,
        "device": device,
        "interface": interface_towards(host),
    }
    try:
        group = open_process_group(begin.backend, timeout_s=_GROUP_TIMEOUT_S, **place)
    except RendezvousError as error:
        raise seat.channel.wait_failure(_FAILURE_WAIT_S) or error from error
    team = Team(
        rank=rank,
        sender=begin.sender,
        hosts=tuple(begin.hosts),
        device=device,
        group=group,
        channel=seat.channel,
    )
    # The stall watch would end the bench, where only a row is to fail.
    limit_s = min(settings.join_timeout_s, settings.stall_timeout_s / 2)
    open_group = partial(open_default_group, begin.backend, limit_s=limit_s, **place)
    bench_rank = BenchRank(settings, team, seat.transfer_id, open_group)
    seat.channel.be_patient(0.0)
    return bench_rank


def _close_group(team: Team) -> None:
    """Every rank has done its last collective; a group that will not close is left behind."""
    team.synchronize()
    with suppress(RuntimeError):
        begin_close(team.group, team.device).wait(_CLOSE_LIMIT_S)


def _exit_code(lead: Lead) -> int:
    if lead.num_wrong:
        return VerificationError.exit_code
    return 0 if lead.num_measured else TransferError.exit_code
