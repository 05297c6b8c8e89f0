"""A broadcast over CPUs along a chain of ranks: each rank passes on what it receives.

gloo's own broadcast is a tree whose root sends everything log2(N) times. In a chain no rank sends
anything twice, and it passes on one piece while it receives the next. A hop of the chain between
hosts is a process group of two ranks and uses broadcasts: the works of point-to-point `send` and
`recv` cannot be polled, and a `wait` on one that times out closes all connections of the group.
Between ranks of one host see `memory_hop`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch._C._distributed_c10d import BroadcastOptions, Work

from packcast.packed.chain_order import neighbours
from packcast.packed.plan import PAGE, align_up
from packcast.packed.unfinished import keep, release_ended

# Pieces of a chunk have about this size, the same on all ranks. Smaller ones fill a long chain
# sooner, but each costs 0.2 ms of CPU time at either end; these fill the chain of 300 hosts in 4 %
# of the time that 140 GB take.
PIECE_NBYTES = 16 << 20

_LOOK_UP_EVERY_S = 0.1
_GRACE_S = 0.5
_CUT_LIMIT_S = 0.2


class PairGroup(Protocol):
    """A hop's process group, as torch's: rank 0 is upstream, rank 1 downstream."""

    def broadcast(self, tensors: list[torch.Tensor], opts: BroadcastOptions) -> Work: ...
    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int) -> Work: ...


class PieceWork(Protocol):
    """A piece that is sent or received, as torch's Work."""

    def is_completed(self) -> bool: ...
    def wait(self, timeout: timedelta = ..., /) -> object: ...


class Hop(Protocol):
    """One rank's end of a hop."""

    def start(self, piece: torch.Tensor) -> PieceWork:
        """Begin to send or to receive the piece, in order; returns at once."""

    def cut(self) -> None:
        """End what is under way, so that nothing uses its tensors any more."""

    def close(self) -> None:
        """Nothing is under way any more."""


@dataclass(frozen=True, slots=True)
class GlooHop:
    """A hop over gloo: a group of two, with one or more connections."""

    group: PairGroup
    connections: int
    is_upstream: bool

    def start(self, piece: torch.Tensor) -> Work:
        """Enqueue the piece."""
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self.group.broadcast([piece], options)

    def cut(self) -> None:
        """Close the connections, so that gloo ends what is under way and uses no tensor any more.

        gloo closes them when a wait on a point-to-point work times out.
        """
        for tag in range(self.connections):
            with suppress(RuntimeError):  # also if the connection is closed already
                work = self.group.recv([torch.empty(1)], int(self.is_upstream), tag)
                work.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """The connections close with the last reference to the group."""


class ChunkSent:
    """The event of a chunk on its way to the next rank; once passed, the memory may be reused."""

    cuda_event = None

    def __init__(self, works: list[PieceWork], wait: Callable[[PieceWork, float], bool]) -> None:
        self._works = works
        self.passed_at = time.perf_counter()
        self._wait = wait

    def passed(self) -> bool:
        """Never blocks; raises RuntimeError where gloo failed to send it."""
        return self.passes_within(0.0)

    def passes_within(self, limit_s: float) -> bool:
        """Wait at most `limit_s`; whether it has passed. Raises like `synchronize`."""
        deadline = time.monotonic() + limit_s
        while self._works and self._wait(self._works[0], deadline - time.monotonic()):
            self._works.pop(0)
            self.passed_at = time.perf_counter()
        return not self._works

    def synchronize(self) -> None:
        """Block until it has passed; raises the transfer's failure, else gloo's error."""
        while not self.passes_within(_LOOK_UP_EVERY_S):
            pass


class Chain:
    """This rank's part of the chains of all chunks; one thread uses it, in chunk order.

    `before` and `after` are the hops to and from this rank, None where no chunk passes. `check`
    raises the transfer's failure if there is one. `order` is the same on all ranks.
    """

    def __init__(
        self,
        before: Hop | None,
        after: Hop | None,
        *,
        rank: int,
        order: Sequence[int],
        check: Callable[[], object],
        piece_nbytes: int = PIECE_NBYTES,
    ) -> None:
        self._before = before
        self._after = after
        self._rank = rank
        self._order = order
        self._check = check
        self._piece_nbytes = piece_nbytes
        self._arriving: deque[tuple[torch.Tensor, list[PieceWork]]] = deque()
        self._under_way: deque[tuple[PieceWork, Hop, torch.Tensor]] = deque()
        self._starting = threading.Lock()  # so that nothing starts after `close`
        self._is_closed = False
        self.sent_nbytes = 0

    def begin(self, memory: torch.Tensor, root: int) -> None:
        """Start to receive the chunk into `memory`, unless this rank is its root.

        Call it for each chunk in order, as far ahead of `carry` as there are free slots.
        """
        before, _ = neighbours(self._order, root, self._rank)
        if before is not None:
            works = [self._start(self._before, piece) for piece in self._pieces(memory)]
            self._arriving.append((memory, works))

    def carry(self, memory: torch.Tensor, root: int) -> ChunkSent:
        """Block until the chunk is received, and pass it on meanwhile; it may be read then.

        It may be overwritten once the returned event has passed. Raises the transfer's failure, or
        RuntimeError if gloo failed first.
        """
        self._check()
        before, after = neighbours(self._order, root, self._rank)
        pieces = self._pieces(memory)
        arriving: list[PieceWork] = []
        if before is not None:
            begun, arriving = self._arriving.popleft()
            assert begun.data_ptr() == memory.data_ptr(), "not in the order of `begin`"
        leaving: list[PieceWork] = []
        for i, piece in enumerate(pieces):
            if before is not None:
                self._await(arriving[i])
            if after is not None:
                leaving.append(self._start(self._after, piece))
                self.sent_nbytes += piece.numel()
        return ChunkSent(leaving, self._ends_within)

    def close(self) -> None:
        """Close the connections; idempotent, any thread.

        After a failure this takes most of a second and makes the neighbours fail: notify them of
        the cause before. A work that does not end is kept with its memory until its timeout, since
        gloo forgets one that is half sent or received when its connection ends.
        """
        with self._starting:
            if self._is_closed:
                return
            self._is_closed = True
        release_ended()
        # Works that both sides have started end by themselves if the neighbours are alive. The
        # rest was started on one side only, and the cut ends it.
        if self._left() and not self._have_ended(_GRACE_S):
            for hop in (self._before, self._after):
                if hop is not None:
                    hop.cut()
            self._have_ended(_CUT_LIMIT_S)
        for work, hop, piece in self._left():
            keep(work, hop, piece)
        for hop in (self._before, self._after):
            if hop is not None:
                hop.close()
        # A slot may keep an event of this chain, which must not keep the connections.
        self._under_way.clear()
        self._arriving.clear()
        self._before = self._after = None

    def _left(self) -> list[tuple[PieceWork, Hop, torch.Tensor]]:
        return [entry for entry in list(self._under_way) if not entry[0].is_completed()]

    def _have_ended(self, limit_s: float) -> bool:
        """Wait at most `limit_s` for all works; whether all have ended, well or not."""
        deadline = time.monotonic() + limit_s
        for work, _, _ in self._left():
            if (left_s := deadline - time.monotonic()) > 0:
                with suppress(RuntimeError):
                    work.wait(timedelta(seconds=max(0.001, left_s)))
        return not self._left()

    def _pieces(self, memory: torch.Tensor) -> Sequence[torch.Tensor]:
        """Pieces of about equal size: a rest of a few bytes would cost as much as a piece."""
        count = max(1, memory.numel() // self._piece_nbytes)
        size = max(PAGE, align_up(-(-memory.numel() // count), PAGE))
        pieces: Sequence[torch.Tensor] = memory.split(size)
        return pieces

    def _start(self, hop: Hop | None, piece: torch.Tensor) -> PieceWork:
        with self._starting:
            self._check_closed()
            assert hop is not None, "the hop is not connected"
            while self._under_way and self._under_way[0][0].is_completed():
                self._under_way.popleft()
            work = hop.start(piece)
            self._under_way.append((work, hop, piece))
        return work

    def _check_closed(self) -> None:
        if self._is_closed:
            raise RuntimeError("the chain has been closed")

    def _await(self, work: PieceWork) -> None:
        while not self._ends_within(work, _LOOK_UP_EVERY_S):
            pass

    def _ends_within(self, work: PieceWork, limit_s: float) -> bool:
        """Wait at most `limit_s`; whether the work has ended. Raises the transfer's failure, or
        the work's error."""
        if not work.is_completed():
            if limit_s <= 0:
                return False
            wait = timedelta(seconds=max(0.001, min(limit_s, _LOOK_UP_EVERY_S)))
            with suppress(RuntimeError):  # a timeout, or gloo's error, which is raised below
                work.wait(wait)
                return True
            self._check()
            self._check_closed()
            if not work.is_completed():
                return False
        work.wait()
        return True
