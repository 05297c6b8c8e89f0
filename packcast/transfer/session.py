"""Joining: who started this process, who sends, and the control channel between the ranks."""

from __future__ import annotations

import os
import secrets
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.control.acceptor import listen
from packcast.control.addresses import addresses_here, text_of
from packcast.control.client import ControlClient
from packcast.control.handshake import enter
from packcast.control.membership import Expected
from packcast.control.rank_info import MAX_PATH_LENGTH, RankInfo, printable
from packcast.control.server import ControlServer
from packcast.errors import PackcastError, RendezvousError
from packcast.io.memory import memory_limits
from packcast.launch.devices import boot_id, host_name, visible_gpus
from packcast.launch.exit import ExitHandler
from packcast.launch.find_sender import (
    SenderAddress,
    await_address,
    hosts_of,
    leave_failed_join,
    post_route,
    publish_address,
    publish_failure,
    settle_sender,
)
from packcast.launch.gpumemory import free_nbytes
from packcast.launch.handover import LOOPBACK, received
from packcast.launch.launchers import Launch
from packcast.launch.rendezvous import Rendezvous, open_rendezvous
from packcast.launch.secret import OPEN_LAUNCH, launch_context, launch_secret
from packcast.launch.validation import launch_of
from packcast.settings import Settings
from packcast.transfer.listening import (
    address_for_others,
    host_in_launch,
    hosts_to_reach,
    recv_line,
)
from packcast.view import View

_GRACE_S = 5.0  # for the others to read why a join has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The result of the rendezvous. The sender has a server and a checkpoint.

    Other ranks that ran `send` and can read the checkpoint have it too: they may be readers.
    `rendezvous` is set under torchrun, Slurm and mpirun.
    """

    settings: Settings
    view: View
    exit_handler: ExitHandler
    launch: Launch
    channel: ControlServer | ControlClient
    checkpoint: Checkpoint | None
    files: tuple[OutgoingFile, ...]
    rendezvous: Rendezvous | None

    def have_joined(self) -> None:
        """All ranks have joined: close the rendezvous, so that its port is free."""
        if self.rendezvous is not None:
            self.rendezvous.close()

    def leave(self) -> None:
        """At the end; before all have joined this waits a moment until the port is free."""
        if self.rendezvous is not None:
            self.rendezvous.close(_GRACE_S)


def open_session(
    settings: Settings,
    view: View,
    exit_handler: ExitHandler,
    *,
    call: int,
    load: Callable[[], object] = lambda: None,
) -> Session:
    """Find the other ranks and open the control channel; every rank calls this first.

    `call` counts the transfers of one launch. `load` imports torch and the rest of the transfer: it
    is called before the control thread starts, which could send no heartbeat for those seconds.
    Raises CheckpointError on a sender without a valid checkpoint (the others receive the reason),
    RendezvousError if the group cannot be formed.
    """
    launch = launch_of(os.environ, by_address=settings.by_address)
    if launch.kind != "none" and launch.world_size < 2:
        raise RendezvousError(
            "the group has one rank, so there are no workers to send to",
            hint="start at least two, for example with torchrun --nproc-per-node 2",
        )
    if launch.kind == "none":
        return _Joining(settings, launch, view, exit_handler).without_launcher(load)
    load()
    if launch.kind == "nproc":
        return _Joining(settings, launch, view, exit_handler).with_nproc()
    context = launch_context(launch, os.environ, call)
    secret = launch_secret(launch, os.environ, settings.token, context)
    if secret is None and launch.rank == 0:
        view.warn(OPEN_LAUNCH)
    return _Joining(settings, launch, view, exit_handler).with_launcher(secret, call)


class _Joining:
    """One rank's way to its session, by each kind of launch."""

    def __init__(
        self, settings: Settings, launch: Launch, view: View, exit_handler: ExitHandler
    ) -> None:
        self._settings = settings
        self._launch = launch
        self._view = view
        self._exit_handler = exit_handler
        self._checkpoint: Checkpoint | None = None
        self._files: tuple[OutgoingFile, ...] = ()
        self._fault: PackcastError | None = None  # fatal only on the rank that is to send
        self._rendezvous: Rendezvous | None = None
        if settings.checkpoint is not None:
            try:
                self._open_checkpoint(settings.checkpoint)
            except PackcastError as fault:
                self._fault = fault
        self._me = _introduction(settings, launch, self._checkpoint)

    def without_launcher(self, load: Callable[[], object]) -> Session:
        if self._fault is not None:
            raise self._fault
        settings, view = self._settings, self._view
        assert settings.address is not None, "the launch has been validated"
        host, port = settings.address
        if settings.command == "recv":
            load()
            return self._connect([host], port, settings.token)
        assert settings.workers is not None, "the launch has been validated"
        token = settings.token or secrets.token_urlsafe(18).encode()
        host = address_for_others(host, settings.join_timeout_s, view)
        listener = listen(host, port or settings.port_range or 0)
        address = listener.getsockname()
        where, *more = hosts_to_reach(text_of(address))
        shown = None if settings.token else token.decode()
        view.listening(recv_line(where, address[1], shown, settings.token_file))
        if more:
            view.note(f"or by another address of this host: {', '.join(more)}")
        load()
        return self._session(self._serve(settings.workers, listener, token))

    def with_nproc(self) -> Session:
        """No store is needed: `--nproc` has handed over what the ranks must know of each other."""
        launch, handover = self._launch, received()
        if handover is None:
            raise RendezvousError(
                "PACKCAST_LAUNCH_FD is set, but `--nproc` did not start this process",
                hint="unset PACKCAST_LAUNCH_FD",
            )
        self._view.placed(launch.rank, is_sender=launch.rank == 0)
        token = handover.token.encode()
        if launch.rank != 0:
            port = handover.await_port(self._settings.join_timeout_s)
            return self._connect([LOOPBACK], port, token)
        if self._fault is not None:
            raise self._fault
        server = self._listen(LOOPBACK, token)
        handover.publish_port(server.address[1], launch.world_size - 1)
        return self._session(server)

    def with_launcher(self, secret: bytes | None, call: int) -> Session:
        settings = self._settings
        deadline = time.monotonic() + settings.join_timeout_s + _GRACE_S
        self._rendezvous = rendezvous = open_rendezvous(
            self._launch,
            os.environ,
            settings.join_timeout_s,
            settings.port,
            secret=secret,
            call=call,
            log=self._view.note,
        )
        try:
            return self._meet(rendezvous, secret)
        except PackcastError:
            leave_failed_join(rendezvous, self._launch, max(0.0, deadline - time.monotonic()))
            raise
        except BaseException:
            rendezvous.close()
            raise

    def _meet(self, rendezvous: Rendezvous, secret: bytes | None) -> Session:
        launch, limit_s = self._launch, self._settings.join_timeout_s
        if not launch.is_one_host:
            post_route(rendezvous, launch)
        command, log = self._settings.command, self._view.note
        sender = settle_sender(rendezvous, launch, command, limit_s, log)
        self._view.placed(launch.rank, is_sender=sender == launch.rank)
        if sender != launch.rank:
            address = await_address(rendezvous, limit_s)
            return self._connect(hosts_of(address, rendezvous), address.port, secret)
        try:
            if self._fault is not None:
                raise self._fault
            host = host_in_launch(rendezvous, launch, limit_s, self._view.note)
            server = self._listen(host, secret)
        except PackcastError as error:
            publish_failure(rendezvous, error)
            raise
        hosts = (host,) if host else tuple(addresses_here())
        publish_address(rendezvous, SenderAddress(hosts, server.address[1], beside_store=not host))
        return self._session(server)

    def _listen(self, host: str, token: bytes | None) -> ControlServer:
        """For the ranks of a launch."""
        listener = listen(host, self._settings.port_range or 0)
        return self._serve(frozenset(range(self._launch.world_size)), listener, token)

    def _serve(
        self, expected: Expected, listener: socket.socket, token: bytes | None
    ) -> ControlServer:
        return ControlServer(
            expected,
            listener=listener,
            me=self._me,
            transfer_id=uuid.uuid4().hex,
            token=token,
            heartbeat_timeout_s=self._settings.heartbeat_timeout_s,
            on_failure=self._exit_handler.leave,
            log=self._view.note,
        )

    def _connect(self, hosts: Sequence[str], port: int, token: bytes | None) -> Session:
        entered = enter(
            hosts,
            port,
            me=self._me,
            token=token,
            join_timeout_s=self._settings.join_timeout_s,
            heartbeat_timeout_s=self._settings.heartbeat_timeout_s,
            log=self._view.note,
            still_wanted=lambda: self._exit_handler.error is None,
        )
        return self._session(
            ControlClient(entered, on_failure=self._exit_handler.leave, log=self._view.note)
        )

    def _session(self, channel: ControlServer | ControlClient) -> Session:
        return Session(
            settings=self._settings,
            view=self._view,
            exit_handler=self._exit_handler,
            launch=self._launch,
            channel=channel,
            checkpoint=self._checkpoint,
            files=self._files,
            rendezvous=self._rendezvous,
        )

    def _open_checkpoint(self, path: Path) -> None:
        settings = self._settings
        checkpoint = open_checkpoint(
            path,
            sidecars=settings.sidecars,
            all_files=settings.all_files,
            exclude_files=settings.exclude_files,
            follow_links=settings.follow_links,
        )
        self._files = outgoing_files(checkpoint, include=settings.include, exclude=settings.exclude)
        self._checkpoint = checkpoint


def _introduction(settings: Settings, launch: Launch, checkpoint: Checkpoint | None) -> RankInfo:
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
