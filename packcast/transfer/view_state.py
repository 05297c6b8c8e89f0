"""A view's updates, made from the offer, the control channel and its heartbeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from packcast.control.messages import JoinStatus
from packcast.control.rank_info import RankInfo
from packcast.control.server import ControlServer, OnJoin
from packcast.io.pool import pool_kind
from packcast.settings import Settings
from packcast.transfer.offer import Offer
from packcast.view import Joining, Start, View, WorkerState


def joining_updates(settings: Settings, server: ControlServer, view: View) -> OnJoin:
    """Update the view now, and once for each worker that joins."""
    deadline = time.monotonic() + settings.join_timeout_s
    left = set(server.ranks_to_come)
    view.joining(Joining(0, server.wanted, tuple(sorted(left)), None, deadline))

    def has_joined(worker: RankInfo, joined: int, wanted: int) -> None:
        if worker.rank is not None:
            left.discard(worker.rank)
        missing = tuple(sorted(left))
        view.joining(Joining(joined, wanted, missing, worker.label, deadline, worker.host))

    return has_joined


def told_by_sender(view: View) -> Callable[[JoinStatus], None]:
    """Tells a worker's view how many have joined, by what the sender says."""

    def has_heard(status: JoinStatus) -> None:
        deadline = time.monotonic() + status.left_s
        view.joining(Joining(status.joined, status.wanted, status.missing, None, deadline))

    return has_heard


def worker_states(server: ControlServer) -> dict[int, WorkerState]:
    """Each worker's progress, by its newest heartbeat."""
    return {
        rank: WorkerState(progress.done, progress.stage)
        for rank, progress in server.progress_by_worker().items()
    }


def start_of(
    offer: Offer,
    *,
    is_sender: bool,
    hosts: Mapping[int, str] | None = None,
    is_low: bool = False,
) -> Start:
    """The start line, made from the offer."""
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
        is_low=is_low,
    )
