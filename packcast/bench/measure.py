"""A whole bench on one rank: join, open the process group, run the sweep, leave together.

The one place where the bench knows how ranks meet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from packcast.bench.model import SENDER, BenchSettings, BenchView
from packcast.bench.ranks import Ranks, StepFailed
from packcast.bench.runner import Runner
from packcast.bench.steps import Begin, Did, Left
from packcast.control.addresses import interface_towards
from packcast.control.channel import Channel
from packcast.control.client import ControlClient
from packcast.control.frames import Progress
from packcast.control.messages import Commit
from packcast.control.server import ControlServer
from packcast.errors import PackcastError, RendezvousError, TransferError, UsageError
from packcast.launch.devices import assign_devices
from packcast.launch.exit import ProcessExit
from packcast.launch.hops import open_hops
from packcast.launch.launchers import detect_launch
from packcast.launch.processgroup import begin_close, open_process_group
from packcast.launch.store import join_served_store, serve_store
from packcast.packed.chain import Chain
from packcast.packed.chain_order import chain_order
from packcast.packed.plan import check_buffers
from packcast.settings import Settings
from packcast.transfer.session import Session, open_session
from packcast.transfer.stall import StallWatch
from packcast.view import View

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PATIENCE_S = 30.0
_CLOSE_LIMIT_S = 15.0
_CAUSE_LIMIT_S = 5.0
_DEVICE_START_S = 30.0  # while NCCL and CUDA start, which may hold the interpreter
# A backstop only, as in a transfer.
_GROUP_TIMEOUT_S = 24 * 3600.0


def run(settings: BenchSettings, view: BenchView, exit_handler: ProcessExit) -> int:
    """Take part in one bench; every rank that a launcher started calls it, with the same settings.

    Returns the exit code, the same on all ranks: 0, 5 where no row could be measured, 6 where
    bytes were wrong. Raises PackcastError after telling the other ranks; a lost rank or a stall
    ends the process through `exit_handler`. Files that it made are removed however it ends. Only
    the sender's view is updated.
    """
    for buffer_size in settings.buffer_sizes:
        for num_buffers in settings.num_buffers:
            check_buffers(buffer_size, num_buffers)
    if detect_launch(os.environ).kind == "none":
        raise UsageError(
            "a bench needs at least two ranks", hint="start them with --nproc 2, torchrun or srun"
        )
    session = open_session(_as_transfer(settings), View(), exit_handler, call=0)
    channel = session.channel
    exit_handler.on_leave(lambda: channel.fail(exit_handler.error or TransferError("it left")))
    agreed: PackcastError | None = None
    code = 0
    try:
        ranks, warning = _open(settings, session)
        try:
            told = view if ranks.is_sender else BenchView()
            code = _sweep(settings, ranks, warning, told, exit_handler)
        except StepFailed as failed:  # all know of it, and say the same
            agreed = failed.first
        exit_handler.shield()
        _leave(channel)
    except PackcastError as error:
        channel.fail(error)
        raise
    except RuntimeError as error:  # torch's own, of a collective or a copy
        cause = channel.wait_failure(_CAUSE_LIMIT_S) or TransferError(
            f"the bench broke: {(str(error).splitlines() or ['?'])[0]}"
        )
        channel.fail(cause)
        raise cause from error
    finally:
        session.leave()
    if agreed is not None:
        raise agreed
    return code


def _sweep(
    settings: BenchSettings,
    ranks: Ranks,
    warning: str | None,
    view: BenchView,
    exit_handler: ProcessExit,
) -> int:
    """All rows; what was made for them is removed on the way out, whichever that is."""
    channel = ranks.channel
    runner = Runner(settings, ranks, view, warning)
    exit_handler.on_leave(runner.show_partial_rows)
    exit_handler.on_leave(runner.remove_files)
    channel.follow(runner.position, lambda: Progress(moved=runner.moved()))
    try:
        with StallWatch(runner, channel, exit_handler, settings.stall_timeout_s):
            code = runner.run()
            ranks.synchronize()
            with suppress(RuntimeError):  # a group that does not close is left behind
                begin_close(ranks.group, ranks.device).wait(_CLOSE_LIMIT_S)
            return code
    finally:
        runner.remove_files()


def _leave(channel: ControlServer | ControlClient) -> None:
    """After the last row: all ranks let the connection go at the same time."""
    if isinstance(channel, ControlServer):
        channel.gather(Did, _PATIENCE_S)
        channel.commit()
        channel.broadcast(Commit())
        channel.gather(Left, _PATIENCE_S)
    else:
        channel.send(Did())
        channel.expect(Commit, _PATIENCE_S)
        channel.commit()
        channel.send(Left())
    channel.close()


def _open(settings: BenchSettings, session: Session) -> tuple[Ranks, str | None]:
    """Join and make the process group, which waits for all ranks; a warning on the sender."""
    channel, join_timeout_s = session.channel, settings.join_timeout_s
    warning = None
    if isinstance(channel, ControlServer):
        infos = channel.join(join_timeout_s, lambda *_: None)
        session.have_joined()
        assignment = assign_devices(infos, settings.backend)
        if assignment.loud:
            warning = f"{assignment.backend}: {assignment.reason}"
        rank, host = session.launch.rank, channel.host_met()
        store, port = serve_store(host, join_timeout_s, settings.port_range)
        boots = list(dict.fromkeys(info.boot_id for info in infos))
        begin = Begin(
            settings=_digest(settings),
            hosts=[boots.index(info.boot_id) for info in infos],
            devices=[assignment.devices[rank] for rank in range(len(infos))],
            backend=assignment.backend,
            host=host,
            port=port,
        )
        assert rank == SENDER, "the lowest rank of a launch"
        channel.broadcast(begin)
    else:
        me, _ = channel.await_joined(join_timeout_s + _PATIENCE_S)
        session.have_joined()
        begin = channel.expect(Begin, join_timeout_s + _PATIENCE_S)
        if begin.settings != _digest(settings):
            raise RendezvousError(
                f"{me.label} was started with other options than the sender, {channel.sender.label}"
            )
        rank, host = me.known_rank, channel.host_told(begin.host)
        store = join_served_store(host, begin.port, join_timeout_s)
    return _connect(settings, channel, begin, rank, host, store), warning


def _connect(
    settings: BenchSettings, channel: Channel, begin: Begin, rank: int, host: str, store: Store
) -> Ranks:
    device = torch.device(begin.devices[rank])
    if begin.backend == "nccl":
        channel.be_patient(_DEVICE_START_S)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    interface = interface_towards(host)
    try:
        group = open_process_group(
            begin.backend,
            rank=rank,
            world_size=len(begin.hosts),
            store=store,
            device=device,
            timeout_s=_GROUP_TIMEOUT_S,
            interface=interface,
            check=channel.check,
        )
    except RendezvousError as error:
        raise channel.wait_failure(_CAUSE_LIMIT_S) or error from error
    channel.be_patient(0.0)

    def open_chain_of(roots: Sequence[int], name: str) -> Chain:
        from torch._C._distributed_c10d import PrefixStore

        order = chain_order([str(host) for host in begin.hosts])
        hops = open_hops(
            order,
            roots,
            rank=rank,
            store=PrefixStore(name, store),
            timeout_s=settings.stall_timeout_s + _PATIENCE_S,
            interface=interface,
            check=channel.check,
        )
        return Chain(*hops, rank=rank, order=order, check=channel.check)

    return Ranks(
        rank=rank,
        hosts=tuple(begin.hosts),
        device=device,
        group=group,
        channel=channel,
        open_chain=open_chain_of,
    )


def _as_transfer(settings: BenchSettings) -> Settings:
    """What a transfer with these settings would be: for joining."""
    return Settings(
        command="send",
        checkpoint=settings.checkpoint,
        backend=settings.backend,
        device=settings.device,
        port=settings.port,
        port_range=settings.port_range,
        token=settings.token,
        join_timeout_s=settings.join_timeout_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        stall_timeout_s=settings.stall_timeout_s,
    )


def _digest(settings: BenchSettings) -> str:
    """Equal on two ranks iff they were asked for the same; where files lie may differ."""
    here = Path()
    checkpoint = None if settings.checkpoint is None else here
    same = replace(
        settings, checkpoint=checkpoint, directory=here, write_directory=here, device="", token=None
    )
    return xxhash.xxh3_128_hexdigest(repr(same).encode())
