"""Taking part: who started this process, who sends, and the control channel between them."""

from __future__ import annotations

import os
import secrets
import shlex
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.errors import PackcastError, RendezvousError
from packcast.group.addresses import (
    addresses_here,
    host_and_port,
    is_everywhere,
    is_literal,
    is_loopback,
    resolve,
    says_loopback,
    source_towards,
    text_of,
)
from packcast.group.asking import launch_of
from packcast.group.devices import boot_id, host_name, visible_gpus
from packcast.group.hub import Hub
from packcast.group.launch import Launch
from packcast.group.leave import WayOut
from packcast.group.line import Line
from packcast.group.meeting import (
    Meeting,
    Whereabouts,
    await_address,
    leave_last,
    open_meeting,
    publish_address,
    publish_failure,
    settle_sender,
)
from packcast.group.member import Member
from packcast.group.roster import Expected
from packcast.settings import Settings
from packcast.view import View

_RESOLVE_AGAIN_S = 1.0
_GRACE_S = 5.0  # for the others to read why a join has failed

# What to send, or why there is nothing.
Opened = tuple[Checkpoint | None, tuple[OutgoingFile, ...], PackcastError | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """This process's place in the group. The sender has a Hub and a checkpoint, others a Line.

    `checkpoint` is there too on other ranks that ran `send` and can see it: they may be readers.
    A launcher's ranks have met in the `meeting`.
    """

    launch: Launch
    channel: Hub | Line
    expected: Expected
    transfer_id: str
    meeting: Meeting | None
    checkpoint: Checkpoint | None
    files: tuple[OutgoingFile, ...]

    def have_joined(self) -> None:
        """All have: nobody needs the meeting any more, and its port is free before bytes move."""
        if self.meeting is not None:
            self.meeting.close()

    def leave(self) -> None:
        """The end. Where that comes before all have joined it waits for the port a moment."""
        if self.meeting is not None:
            self.meeting.close(_GRACE_S)


def take_seat(settings: Settings, view: View, leaver: WayOut, *, call: int) -> Seat:
    """Find the others and open the control channel; every rank calls this first.

    `call` tells the transfers of one launch apart. Raises CheckpointError on the sender whose
    checkpoint is none (the others are told), and RendezvousError where the group cannot come about.
    """
    launch = launch_of(os.environ, by_address=settings.by_address)
    checkpoint, files, fault = _open(settings)
    if launch.kind == "none":
        if fault:
            raise fault
        me = _introduce(settings, launch, checkpoint)
        return _sit_without_launcher(settings, launch, me, checkpoint, files, view, leaver)
    if launch.world_size < 2:
        raise RendezvousError(
            "the group has one rank, so there is nobody to send to",
            hint="start at least two, as with torchrun --nproc-per-node 2",
        )
    me = _introduce(settings, launch, checkpoint)
    deadline = time.monotonic() + settings.join_timeout_s + _GRACE_S
    meeting = open_meeting(launch, os.environ, settings.join_timeout_s, settings.port, call=call)
    try:
        return _sit_with_launcher(
            settings, launch, me, meeting, (checkpoint, files, fault), view, leaver
        )
    except PackcastError:
        leave_last(meeting, launch, max(0.0, deadline - time.monotonic()))
        raise
    except BaseException:
        meeting.close()
        raise


def _sit_with_launcher(
    settings: Settings,
    launch: Launch,
    me: Member,
    meeting: Meeting,
    opened: Opened,
    view: View,
    leaver: WayOut,
) -> Seat:
    checkpoint, files, fault = opened
    sender = settle_sender(meeting, launch, settings.command, settings.join_timeout_s)
    view.placed(launch.rank, is_sender=sender == launch.rank)
    if sender != launch.rank:
        told = await_address(meeting, settings.join_timeout_s)
        line = _connect(settings, meeting.hosts_of(told), told.port, me, view, leaver)
        return _seat(launch, line, line.transfer_id, meeting, checkpoint, files)
    transfer_id = uuid.uuid4().hex
    try:
        if fault:
            raise fault
        host = _host_to_listen_on(meeting)
        hub = _listen((host, 0), settings, me, transfer_id, settings.token, view, leaver)
    except PackcastError as error:
        publish_failure(meeting, error)
        raise
    hosts = (host,) if host else tuple(addresses_here())
    publish_address(meeting, Whereabouts(hosts, hub.address[1], beside_store=not host))
    return _seat(launch, hub, transfer_id, meeting, checkpoint, files)


def _host_to_listen_on(meeting: Meeting) -> str:
    """One address of this host, if it is certain that the others reach it; "" is every one.

    They have reached the launcher's store. If that is on another host, this one's address on the
    way there will do. If it is here, then what they call it counts: an address is the same
    everywhere, but a name can be another address, even loopback, on its own host.
    """
    host = meeting.host
    if says_loopback(host):
        return meeting.there or "127.0.0.1"
    if not meeting.is_here and meeting.here is not None:
        return meeting.here
    return host if is_literal(host) and source_towards(host) == host else ""


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
        host, port = settings.address
        line = _connect(settings, [host], port, me, view, leaver)
        return _seat(launch, line, line.transfer_id, None, None, ())
    assert settings.workers is not None, "the command line asks for it"
    token = settings.token or secrets.token_urlsafe(18).encode()
    transfer_id = uuid.uuid4().hex
    host, port = settings.address
    host = _others_address(host, settings.join_timeout_s, view)
    hub = _listen((host, port), settings, me, transfer_id, token, view, leaver)
    where, *more = _hosts_to_reach(hub.address[0])
    view.listening(_recv_line(where, hub.address[1], None if settings.token else token.decode()))
    if more:
        view.note(f"or by another address of this host: {', '.join(more)}")
    return _seat(launch, hub, transfer_id, None, checkpoint, files, expected=settings.workers)


def _seat(
    launch: Launch,
    channel: Hub | Line,
    transfer_id: str,
    meeting: Meeting | None,
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
        meeting=meeting,
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
            follow_links=settings.follow_links,
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
    settings: Settings, hosts: Sequence[str], port: int, me: Member, view: View, leaver: WayOut
) -> Line:
    return Line.connect(
        hosts,
        port,
        me=me,
        token=settings.token,
        join_timeout_s=settings.join_timeout_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        on_fatal=leaver.leave,
        log=view.note,
        still_wanted=lambda: leaver.error is None,
    )


def _others_address(host: str, limit_s: float, view: View) -> str:
    """What to listen on where `host` is what the workers call this one.

    Its name may not be known yet. And many systems give a host's own name a loopback address
    (127.0.1.1 in /etc/hosts), which is none to the others: then it is every address.
    """
    if is_everywhere(host) or is_literal(host) or says_loopback(host):
        return host
    deadline = time.monotonic() + limit_s
    waiting = False
    while True:
        try:
            found = [text_of(address) for *_, address in resolve(host, 0)]
            break
        except OSError as error:
            if time.monotonic() + _RESOLVE_AGAIN_S > deadline:
                raise RendezvousError(
                    f"cannot listen on {host}: {error.strerror}",
                    hint="--listen takes a name or an address of this host",
                ) from error
            if not waiting:
                view.note(f"waiting until {host} is the name of an address ({error.strerror})")
        waiting = True
        time.sleep(_RESOLVE_AGAIN_S)
    if not all(map(is_loopback, found)) or not addresses_here():
        return host
    view.note(f"{host} is {found[0]} here, which no other host reaches: listening everywhere")
    return ""


def _hosts_to_reach(listening: str) -> list[str]:
    """Where the other ranks reach who listens there, the likeliest first."""
    if not is_everywhere(listening):
        return [listening]
    families = (4, 6) if listening == "::" else (4,)
    here = [host for host in addresses_here() if (6 if ":" in host else 4) in families]
    return here or ["127.0.0.1"]


def _recv_line(host: str, port: int, token: str | None) -> str:
    line = f"packcast recv {shlex.quote(host_and_port(host, port))} --out DIR"
    return f"PACKCAST_TOKEN={shlex.quote(token)} {line}" if token else line
