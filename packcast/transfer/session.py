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
from packcast.control.addresses import (
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
from packcast.control.client import ControlClient
from packcast.control.membership import Expected
from packcast.control.rank_info import MAX_PATH_LENGTH, RankInfo, printable
from packcast.control.server import ControlServer
from packcast.errors import PackcastError, RendezvousError
from packcast.io.memory import memory_limits
from packcast.launch.devices import boot_id, host_name, visible_gpus
from packcast.launch.exit import ExitHandler
from packcast.launch.gpumemory import free_nbytes
from packcast.launch.handover import LOOPBACK, received
from packcast.launch.launchers import Launch
from packcast.launch.rendezvous import (
    Rendezvous,
    SenderAddress,
    await_address,
    await_routes,
    leave_failed_join,
    open_rendezvous,
    post_route,
    publish_address,
    publish_failure,
    settle_sender,
)
from packcast.launch.secret import OPEN_LAUNCH, launch_context, launch_secret
from packcast.launch.validation import launch_of
from packcast.settings import Settings
from packcast.view import View

_RESOLVE_AGAIN_S = 1.0
_GRACE_S = 5.0  # for the others to read why a join has failed

# What to send, or why there is nothing.
Opened = tuple[Checkpoint | None, tuple[OutgoingFile, ...], PackcastError | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The result of the rendezvous. The sender has a server and a checkpoint.

    `checkpoint` is there too on other ranks that ran `send` and can see it: they may be readers.
    A launcher's ranks have met in the `rendezvous`.
    """

    launch: Launch
    channel: ControlServer | ControlClient
    transfer_id: str
    rendezvous: Rendezvous | None
    checkpoint: Checkpoint | None
    files: tuple[OutgoingFile, ...]

    def have_joined(self) -> None:
        """All ranks have joined: close the rendezvous, so that its port is free."""
        if self.rendezvous is not None:
            self.rendezvous.close()

    def leave(self) -> None:
        """The end. Where that comes before all have joined it waits for the port a moment."""
        if self.rendezvous is not None:
            self.rendezvous.close(_GRACE_S)


def open_session(
    settings: Settings, view: View, exit_handler: ExitHandler, *, call: int
) -> Session:
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
        return _join_without_launcher(settings, launch, me, checkpoint, files, view, exit_handler)
    if launch.world_size < 2:
        raise RendezvousError(
            "the group has one rank, so there are no workers to send to",
            hint="start at least two, for example with torchrun --nproc-per-node 2",
        )
    if launch.kind == "nproc":
        me = _introduce(settings, launch, checkpoint)
        return _join_with_nproc(
            settings, launch, me, (checkpoint, files, fault), view, exit_handler
        )
    secret = launch_secret(
        launch, os.environ, settings.token, launch_context(launch, os.environ, call)
    )
    if secret is None and launch.rank == 0:
        view.warn(OPEN_LAUNCH)
    me = _introduce(settings, launch, checkpoint)
    deadline = time.monotonic() + settings.join_timeout_s + _GRACE_S
    rendezvous = open_rendezvous(
        launch,
        os.environ,
        settings.join_timeout_s,
        settings.port,
        secret=secret,
        call=call,
        log=view.note,
    )
    try:
        return _join_with_launcher(
            settings, launch, me, rendezvous, secret, (checkpoint, files, fault), view, exit_handler
        )
    except PackcastError:
        leave_failed_join(rendezvous, launch, max(0.0, deadline - time.monotonic()))
        raise
    except BaseException:
        rendezvous.close()
        raise


def _join_with_nproc(
    settings: Settings,
    launch: Launch,
    me: RankInfo,
    opened: Opened,
    view: View,
    exit_handler: ExitHandler,
) -> Session:
    """The ranks need no store: what they have to know of each other they were handed."""
    checkpoint, files, fault = opened
    handed = received()
    if handed is None:
        raise RendezvousError(
            "PACKCAST_LAUNCH_FD is set, but `--nproc` did not start this process",
            hint="unset PACKCAST_LAUNCH_FD",
        )
    view.placed(launch.rank, is_sender=launch.rank == 0)
    token = handed.token.encode()
    if launch.rank != 0:
        port = handed.await_port(settings.join_timeout_s)
        client = _connect(settings, [LOOPBACK], port, token, me, view, exit_handler)
        return _session(launch, client, client.transfer_id, None, checkpoint, files)
    if fault:
        raise fault
    transfer_id = uuid.uuid4().hex
    expected = frozenset(range(launch.world_size))
    server = _listen(expected, (LOOPBACK, 0), settings, me, transfer_id, token, view, exit_handler)
    handed.publish_port(server.address[1], launch.world_size - 1)
    return _session(launch, server, transfer_id, None, checkpoint, files)


def _join_with_launcher(
    settings: Settings,
    launch: Launch,
    me: RankInfo,
    rendezvous: Rendezvous,
    secret: bytes | None,
    opened: Opened,
    view: View,
    exit_handler: ExitHandler,
) -> Session:
    checkpoint, files, fault = opened
    if not launch.is_one_host:
        post_route(rendezvous, launch)
    sender = settle_sender(rendezvous, launch, settings.command, settings.join_timeout_s)
    view.placed(launch.rank, is_sender=sender == launch.rank)
    if sender != launch.rank:
        told = await_address(rendezvous, settings.join_timeout_s)
        client = _connect(
            settings, rendezvous.hosts_of(told), told.port, secret, me, view, exit_handler
        )
        return _session(launch, client, client.transfer_id, rendezvous, checkpoint, files)
    transfer_id = uuid.uuid4().hex
    try:
        if fault:
            raise fault
        host = _host_to_listen_on(rendezvous, launch, settings, view)
        expected = frozenset(range(launch.world_size))
        server = _listen(expected, (host, 0), settings, me, transfer_id, secret, view, exit_handler)
    except PackcastError as error:
        publish_failure(rendezvous, error)
        raise
    hosts = (host,) if host else tuple(addresses_here())
    publish_address(rendezvous, SenderAddress(hosts, server.address[1], beside_store=not host))
    return _session(launch, server, transfer_id, rendezvous, checkpoint, files)


def _host_to_listen_on(
    rendezvous: Rendezvous, launch: Launch, settings: Settings, view: View
) -> str:
    """The one address of this host at which the others reach it.

    They have reached the launcher's store. If that is on another host, this one's address on the
    way there will do. If it is here, then what they call it counts: an address is the same
    everywhere, but a name can be another address, even loopback, on its own host. "" is every
    address: where they reach this host at several.
    """
    if launch.is_one_host:
        return LOOPBACK
    if not rendezvous.is_here and rendezvous.here is not None:
        return rendezvous.here
    host = rendezvous.host
    if is_literal(host) and source_towards(host) == host:
        return host
    ways = await_routes(rendezvous, launch, settings.join_timeout_s)
    others = [way for way in ways if is_literal(way) and not is_loopback(way)]
    here = [way for way in others if source_towards(way) == way]
    if len(here) > 1:
        view.note(f"ranks reach this host at {', '.join(sorted(here))}: listening on all addresses")
    if not others:
        return LOOPBACK
    return here[0] if len(here) == 1 else ""


def _join_without_launcher(
    settings: Settings,
    launch: Launch,
    me: RankInfo,
    checkpoint: Checkpoint | None,
    files: tuple[OutgoingFile, ...],
    view: View,
    exit_handler: ExitHandler,
) -> Session:
    assert settings.address is not None, "the command line asks for it"
    if settings.command == "recv":
        host, port = settings.address
        client = _connect(settings, [host], port, settings.token, me, view, exit_handler)
        return _session(launch, client, client.transfer_id, None, None, ())
    assert settings.workers is not None, "the command line asks for it"
    token = settings.token or secrets.token_urlsafe(18).encode()
    transfer_id = uuid.uuid4().hex
    host, port = settings.address
    host = _others_address(host, settings.join_timeout_s, view)
    server = _listen(
        settings.workers, (host, port), settings, me, transfer_id, token, view, exit_handler
    )
    where, *more = _hosts_to_reach(server.address[0])
    shown = None if settings.token else token.decode()
    view.listening(_recv_line(where, server.address[1], shown, settings.token_file))
    if more:
        view.note(f"or by another address of this host: {', '.join(more)}")
    return _session(launch, server, transfer_id, None, checkpoint, files)


def _session(
    launch: Launch,
    channel: ControlServer | ControlClient,
    transfer_id: str,
    rendezvous: Rendezvous | None,
    checkpoint: Checkpoint | None,
    files: tuple[OutgoingFile, ...],
) -> Session:
    return Session(
        launch=launch,
        channel=channel,
        transfer_id=transfer_id,
        rendezvous=rendezvous,
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


def _introduce(settings: Settings, launch: Launch, checkpoint: Checkpoint | None) -> RankInfo:
    launched = launch.kind != "none"
    path = settings.checkpoint
    gpus = visible_gpus() if settings.device != "cpu" and settings.backend != "gloo" else ()
    return RankInfo(
        role=settings.command,
        rank=launch.rank if launched else settings.rank,
        host=printable(host_name()),
        boot_id=boot_id(),
        pid=os.getpid(),
        local_rank=launch.local_rank if launched else None,
        device=settings.device,
        gpus=gpus,
        gpu_free=free_nbytes(gpus) if gpus else (),
        memory=memory_limits(),
        checkpoint=printable(str(Path(path).resolve()))[:MAX_PATH_LENGTH] if path else None,
        fingerprint=checkpoint.fingerprint() if checkpoint else None,
    )


def _listen(
    expected: Expected,
    address: tuple[str, int],
    settings: Settings,
    me: RankInfo,
    transfer_id: str,
    token: bytes | None,
    view: View,
    exit_handler: ExitHandler,
) -> ControlServer:
    return ControlServer(
        expected,
        host=address[0],
        port=address[1] or settings.port_range or 0,
        me=me,
        transfer_id=transfer_id,
        token=token,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        on_failure=exit_handler.leave,
        log=view.note,
    )


def _connect(
    settings: Settings,
    hosts: Sequence[str],
    port: int,
    token: bytes | None,
    me: RankInfo,
    view: View,
    exit_handler: ExitHandler,
) -> ControlClient:
    return ControlClient.connect(
        hosts,
        port,
        me=me,
        token=token,
        join_timeout_s=settings.join_timeout_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        on_failure=exit_handler.leave,
        log=view.note,
        still_wanted=lambda: exit_handler.error is None,
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
                view.note(f"waiting until {host} resolves to an address ({error.strerror})")
        waiting = True
        time.sleep(_RESOLVE_AGAIN_S)
    if not all(map(is_loopback, found)) or not addresses_here():
        return host
    view.note(
        f"{host} resolves to {found[0]} here, which other hosts cannot reach:"
        " listening on all addresses"
    )
    return ""


def _hosts_to_reach(listening: str) -> list[str]:
    """Where the other ranks reach who listens there, the likeliest first."""
    if not is_everywhere(listening):
        return [listening]
    families = (4, 6) if listening == "::" else (4,)
    here = [host for host in addresses_here() if (6 if ":" in host else 4) in families]
    return here or ["127.0.0.1"]


def _recv_line(host: str, port: int, token: str | None, token_file: Path | None) -> str:
    line = f"packcast recv {shlex.quote(host_and_port(host, port))} --out DIR"
    if token_file is not None:
        line += f" --token-file {shlex.quote(str(token_file))}"
    return f"PACKCAST_TOKEN={shlex.quote(token)} {line}" if token else line
