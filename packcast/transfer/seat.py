"""Taking part: who started this process, who sends, and the control channel between them."""

from __future__ import annotations

import os
import secrets
import shlex
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.errors import PackcastError, RendezvousError, UsageError
from packcast.group.devices import boot_id, host_name, visible_gpus
from packcast.group.hub import Hub
from packcast.group.launch import Launch, detect_launch, reachable_host
from packcast.group.leave import WayOut
from packcast.group.line import Line
from packcast.group.member import Member
from packcast.group.roster import Expected
from packcast.group.store import (
    await_address,
    leave_last,
    open_store,
    publish_address,
    publish_failure,
    settle_sender,
)
from packcast.settings import Settings
from packcast.view import View

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


_GRACE_S = 5.0  # for the others to read why a join has failed

# What to send, or why there is nothing.
Opened = tuple[Checkpoint | None, tuple[OutgoingFile, ...], PackcastError | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """This process's place in the group. The sender has a Hub and a checkpoint, others a Line.

    `checkpoint` is there too on other ranks that ran `send` and can see it: they may be readers.
    `store` is the launcher's; without one the sender hosts its own later.
    """

    launch: Launch
    channel: Hub | Line
    expected: Expected
    transfer_id: str
    store: Store | None
    checkpoint: Checkpoint | None
    files: tuple[OutgoingFile, ...]


def take_seat(settings: Settings, view: View, leaver: WayOut, *, call: int) -> Seat:
    """Find the others and open the control channel; every rank calls this first.

    `call` tells the transfers of one launch apart. Raises CheckpointError on the sender whose
    checkpoint is none (the others are told), and RendezvousError where the group cannot come about.
    """
    launch = detect_launch(os.environ)
    checkpoint, files, fault = _open(settings)
    if launch.kind == "none":
        if fault:
            raise fault
        me = _introduce(settings, launch, checkpoint)
        return _sit_without_launcher(settings, launch, me, checkpoint, files, view, leaver)
    if settings.workers is not None or settings.address is not None:
        raise UsageError(
            f"{launch.kind} has started this rank: --workers, --listen and HOST:PORT are for"
            " runs without a launcher"
        )
    if launch.world_size < 2:
        raise RendezvousError(
            "the group has one rank, so there is nobody to send to",
            hint="start at least two, as with torchrun --nproc-per-node 2",
        )
    me = _introduce(settings, launch, checkpoint)
    deadline = time.monotonic() + settings.join_timeout_s + _GRACE_S
    store = open_store(launch, os.environ, settings.join_timeout_s, settings.port, call=call)
    try:
        return _sit_with_launcher(
            settings, launch, me, store, (checkpoint, files, fault), view, leaver
        )
    except PackcastError:
        leave_last(store, launch, os.environ, max(0.0, deadline - time.monotonic()))
        raise


def _sit_with_launcher(
    settings: Settings,
    launch: Launch,
    me: Member,
    store: Store,
    opened: Opened,
    view: View,
    leaver: WayOut,
) -> Seat:
    checkpoint, files, fault = opened
    sender = settle_sender(store, launch, settings.command, settings.join_timeout_s)
    view.placed(launch.rank, is_sender=sender == launch.rank)
    if sender != launch.rank:
        address = await_address(store, settings.join_timeout_s)
        line = _connect(settings, address, me, view, leaver)
        return _seat(launch, line, line.transfer_id, store, checkpoint, files)
    transfer_id = uuid.uuid4().hex
    try:
        if fault:
            raise fault
        host = reachable_host(_master(launch, os.environ))
        hub = _listen((host, 0), settings, me, transfer_id, settings.token, view, leaver)
    except PackcastError as error:
        publish_failure(store, error)
        raise
    publish_address(store, hub.address)
    return _seat(launch, hub, transfer_id, store, checkpoint, files)


def _sit_without_launcher(
    settings: Settings,
    launch: Launch,
    me: Member,
    checkpoint: Checkpoint | None,
    files: tuple[OutgoingFile, ...],
    view: View,
    leaver: WayOut,
) -> Seat:
    assert settings.address is not None, "the command line asks for it"
    if settings.command == "recv":
        line = _connect(settings, settings.address, me, view, leaver)
        return _seat(launch, line, line.transfer_id, None, None, ())
    assert settings.workers is not None, "the command line asks for it"
    token = settings.token or secrets.token_urlsafe(18).encode()
    transfer_id = uuid.uuid4().hex
    hub = _listen(settings.address, settings, me, transfer_id, token, view, leaver)
    view.listening(_recv_line(hub.address, None if settings.token else token.decode()))
    return _seat(launch, hub, transfer_id, None, checkpoint, files, expected=settings.workers)


def _seat(
    launch: Launch,
    channel: Hub | Line,
    transfer_id: str,
    store: Store | None,
    checkpoint: Checkpoint | None,
    files: tuple[OutgoingFile, ...],
    *,
    expected: int | None = None,
) -> Seat:
    return Seat(
        launch=launch,
        channel=channel,
        expected=frozenset(range(launch.world_size)) if expected is None else expected,
        transfer_id=transfer_id,
        store=store,
        checkpoint=checkpoint,
        files=files,
    )


def _open(settings: Settings) -> Opened:
    """What to send, or why there is nothing: fatal only on the rank that turns out to send."""
    if settings.checkpoint is None:
        return None, (), None
    try:
        checkpoint = open_checkpoint(
            settings.checkpoint,
            sidecars=settings.sidecars,
            all_files=settings.all_files,
            exclude_files=settings.exclude_files,
        )
        files = outgoing_files(checkpoint, include=settings.include, exclude=settings.exclude)
    except PackcastError as fault:
        return None, (), fault
    return checkpoint, files, None


def _introduce(settings: Settings, launch: Launch, checkpoint: Checkpoint | None) -> Member:
    launched = launch.kind != "none"
    path = settings.checkpoint
    return Member(
        role=settings.command,
        rank=launch.rank if launched else settings.rank,
        host=host_name(),
        boot_id=boot_id(),
        pid=os.getpid(),
        local_rank=launch.local_rank if launched else None,
        device=settings.device,
        gpus=visible_gpus() if settings.device != "cpu" and settings.backend != "gloo" else (),
        checkpoint=str(Path(path).resolve()) if path else None,
        fingerprint=checkpoint.fingerprint() if checkpoint else None,
    )


def _listen(
    address: tuple[str, int],
    settings: Settings,
    me: Member,
    transfer_id: str,
    token: bytes | None,
    view: View,
    leaver: WayOut,
) -> Hub:
    return Hub(
        host=address[0],
        port=address[1],
        me=me,
        transfer_id=transfer_id,
        token=token,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        on_fatal=leaver.leave,
        log=view.note,
    )


def _connect(
    settings: Settings, address: tuple[str, int], me: Member, view: View, leaver: WayOut
) -> Line:
    return Line.connect(
        *address,
        me=me,
        token=settings.token,
        join_timeout_s=settings.join_timeout_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        on_fatal=leaver.leave,
        log=view.note,
        still_wanted=lambda: leaver.error is None,
    )


def _master(launch: Launch, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """An address that all ranks reach, to choose the interface that faces it."""
    if launch.kind == "torchrun":
        return environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    return None


def host_to_reach(listening: tuple[str, int]) -> str:
    """Where the other ranks reach who listens there: the address itself, if it is a single one."""
    return reachable_host(None) if listening[0] in ("0.0.0.0", "::") else listening[0]


def _recv_line(address: tuple[str, int], token: str | None) -> str:
    host = host_to_reach(address)
    where = f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
    line = f"packcast recv {where} --out DIR"
    return f"PACKCAST_TOKEN={shlex.quote(token)} {line}" if token else line
