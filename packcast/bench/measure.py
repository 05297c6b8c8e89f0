"""A whole bench on one rank: join, open the process group, run the sweep, leave together.

The one module of the bench that knows how ranks meet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import xxhash
from pydantic import Field

from packcast.bench.model import SENDER, BenchSettings, BenchView
from packcast.bench.ranks import Ranks, StepFailed
from packcast.bench.runner import Runner
from packcast.control.addresses import interface_towards
from packcast.control.channel import Channel
from packcast.control.client import ControlClient
from packcast.control.frames import Progress
from packcast.control.messages import Commit, Message
from packcast.control.rank_info import Rank
from packcast.control.server import ControlServer
from packcast.errors import PackcastError, RendezvousError, TransferError, UsageError, first_line
from packcast.launch.devices import assign_devices
from packcast.launch.exit import ProcessExit
from packcast.launch.hops import open_hops
from packcast.launch.launchers import detect_launch
from packcast.launch.processgroup import begin_close, open_process_group
from packcast.launch.store import join_served_store, serve_store
from packcast.packed.chain import Chain
from packcast.packed.chain_order import chain_order
from packcast.transfer.session import Session, open_session
from packcast.transfer.stall import StallWatch
from packcast.units import MIB
from packcast.view import View

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PATIENCE_S = 30.0
_CLOSE_LIMIT_S = 15.0
_CAUSE_LIMIT_S = 5.0
_DEVICE_START_S = 30.0  # while NCCL and CUDA start, which may hold the interpreter
# The control channel and the stall watch end a hanging bench before.
_GROUP_TIMEOUT_S = 24 * 3600.0

ShortText = Annotated[str, Field(max_length=255)]


class Begin(Message, kind=64, by="sender", limit=16 * MIB):
    """What every rank needs to know to make the process group. Kinds 64 to 79 are the bench's."""

    settings: ShortText
    hosts: list[Rank]
    devices: list[ShortText]
    backend: Literal["nccl", "gloo"]
    host: ShortText
    port: Annotated[int, Field(ge=1, le=65535)]


class Did(Message, kind=65, by="worker"):
    """This rank has measured every row."""


class Left(Message, kind=66, by="worker"):
    """This rank sends nothing more."""


def run(settings: BenchSettings, view: BenchView, exit_handler: ProcessExit) -> int:
    """Take part in one bench; every rank of a launch calls it, with the same settings.

    Returns the exit code, the same on all ranks: 0, 5 where no row could be measured, 6 where
    bytes were wrong. Raises PackcastError after sending it to the other ranks; a lost rank or a
    stall ends the process through `exit_handler`. Files that it made are always removed. Only the
    sender's view is called.
    """
    if detect_launch(os.environ).kind == "none":
        raise UsageError(
            "a bench needs at least two ranks", hint="start them with --nproc 2, torchrun or srun"
        )
    session = open_session(settings.transfer, View(), exit_handler, call=0)
    channel = session.channel
    exit_handler.on_leave(lambda: channel.fail(exit_handler.error or TransferError("it left")))
    common: PackcastError | None = None
    code = 0
    try:
        ranks, warning = _open(settings, session)
        try:
            my_view = view if ranks.is_sender else BenchView()
            code = _sweep(settings, ranks, warning, my_view, exit_handler)
        except StepFailed as failed:  # on all ranks alike
            common = failed.first
        exit_handler.shield()
        _leave(channel)
    except PackcastError as error:
        channel.fail(error)
        raise
    except RuntimeError as error:  # torch's own, of a collective or a copy
        cause = channel.wait_failure(_CAUSE_LIMIT_S) or TransferError(
            f"the bench broke: {first_line(error)}"
        )
        channel.fail(cause)
        raise cause from error
    finally:
        session.leave()
    if common is not None:
        raise common
    return code


def _sweep(
    settings: BenchSettings,
    ranks: Ranks,
    warning: str | None,
    view: BenchView,
    exit_handler: ProcessExit,
) -> int:
    """All rows; removes the files that were made for them, also after a failure."""
    channel, stall_timeout_s = ranks.channel, settings.transfer.stall_timeout_s
    runner = Runner(settings, ranks, view, warning)
    exit_handler.on_leave(runner.show_partial_rows)
    exit_handler.on_leave(runner.remove_files)
    channel.follow(runner.position, lambda: Progress(moved=runner.moved()))
    try:
        with StallWatch(runner, channel, exit_handler, stall_timeout_s):
            code = runner.run()
            ranks.synchronize()
            with suppress(RuntimeError):  # a group that does not close is left open
                begin_close(ranks.group, ranks.device).wait(_CLOSE_LIMIT_S)
            return code
    finally:
        runner.remove_files()


def _leave(channel: ControlServer | ControlClient) -> None:
    """After the last row: all ranks close the connection at the same time."""
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
    """Join and make the process group, with all ranks; also returns the sender's warning."""
    channel, transfer = session.channel, settings.transfer
    join_timeout_s = transfer.join_timeout_s
    warning = None
    if isinstance(channel, ControlServer):
        infos = channel.join(join_timeout_s, lambda *_: None)
        session.have_joined()
        assignment = assign_devices(infos, transfer.backend)
        if assignment.loud:
            warning = f"{assignment.backend}: {assignment.reason}"
        rank, host = session.launch.rank, channel.host_met()
        store, port = serve_store(host, join_timeout_s, transfer.port_range)
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
    order = tuple(chain_order([str(host) for host in begin.hosts]))

    def open_chain_of(roots: Sequence[int], name: str) -> Chain:
        from torch._C._distributed_c10d import PrefixStore

        hops = open_hops(
            order,
            roots,
            rank=rank,
            store=PrefixStore(name, store),
            timeout_s=settings.transfer.stall_timeout_s + _PATIENCE_S,
            interface=interface,
            check=channel.check,
        )
        return Chain(*hops, rank=rank, order=order, check=channel.check)

    return Ranks(
        rank=rank,
        hosts=tuple(begin.hosts),
        order=order,
        device=device,
        group=group,
        channel=channel,
        open_chain=open_chain_of,
    )


def _digest(settings: BenchSettings) -> str:
    """Equal on two ranks iff they measure the same; paths, devices and secrets may differ."""
    here = Path()
    checkpoint = None if settings.checkpoint is None else here
    transfer = replace(
        settings.transfer, checkpoint=checkpoint, device="", token=None, token_file=None
    )
    same = replace(settings, transfer=transfer, directory=here, write_directory=here)
    return xxhash.xxh3_128_hexdigest(repr(same).encode())
