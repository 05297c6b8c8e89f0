"""What a view is told of a transfer, out of the offer, the control channel and its heartbeats."""

from __future__ import annotations

import time
from collections.abc import Mapping

from packcast.group.hub import Hub, OnJoin
from packcast.group.member import Member
from packcast.io.pool import pool_kind
from packcast.settings import Settings
from packcast.transfer.offer import Offer
from packcast.transfer.seat import Seat
from packcast.view import Joining, Start, View, WorkerState


def told_who_joins(settings: Settings, seat: Seat, view: View) -> OnJoin:
    """Tells the view that this waits for workers, and again for each that comes."""
    deadline = time.monotonic() + settings.join_timeout_s
    expected = seat.expected
    left = set[int]() if isinstance(expected, int) else set(expected - {seat.launch.rank})
    wanted = expected if isinstance(expected, int) else len(left)
    view.joining(Joining(0, wanted, tuple(sorted(left)), None, deadline))

    def has_joined(member: Member, joined: int, wanted: int) -> None:
        if member.rank is not None:
            left.discard(member.rank)
        view.joining(Joining(joined, wanted, tuple(sorted(left)), member.label, deadline))

    return has_joined


def worker_states(hub: Hub) -> dict[int, WorkerState]:
    """Where each worker is, by its newest heartbeat."""
    states = {}
    for rank, told in hub.progress().items():
        nbytes, stage = told.get("nbytes"), told.get("stage")
        states[rank] = WorkerState(
            nbytes if isinstance(nbytes, int) else 0,
            stage[:16] if isinstance(stage, str) and stage.isalnum() else "",
        )
    return states


def start_of(offer: Offer, *, is_sender: bool, hosts: Mapping[int, str] | None = None) -> Start:
    """The start line, out of what was offered."""
    return Start(
        rank=offer.rank,
        is_sender=is_sender,
        num_files=len(offer.files),
        num_tensors=offer.num_tensors,
        nbytes=offer.nbytes,
        world_size=offer.world_size,
        readers=offer.readers,
        backend=offer.backend,
        device=offer.device,
        reason=offer.reason,
        loud=offer.loud,
        buffer_size=offer.buffer_size,
        num_buffers=offer.num_buffers,
        staging=offer.staging,
        pool=pool_kind(),
        hosts=hosts or {},
    )
