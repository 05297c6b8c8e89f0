"""A broadcast over CPUs along a chain of ranks: each rank passes on what it receives.

gloo's own broadcast is a tree, whose root sends everything log2(N) times. In a chain nobody sends
anything more than once, and while a rank receives one piece it passes on the one before. A hop of
the chain is a process group of two ranks. Point-to-point `send` and `recv` would not do: their
works cannot be polled, and a `wait` that times out closes all connections of the group.
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

# A chunk is passed on in pieces of about this size, the same on all ranks. Smaller ones would fill
# a long chain sooner, but each costs 0.2 ms of processor time at either end; these fill the chain
# of 300 hosts in 4 % of the time that 140 GB take.
PIECE_NBYTES = 16 << 20

_LOOK_UP_EVERY_S = 0.1
_GRACE_S = 0.5
_CUT_LIMIT_S = 0.2


class PairGroup(Protocol):
    """What a hop needs of its process group: rank 0 is upstream, rank 1 downstream."""

    def broadcast(self, tensors: list[torch.Tensor], opts: BroadcastOptions) -> Work:
        """Enqueue a broadcast of one tensor, in place."""

    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int) -> Work:
        """Begin to receive from the other rank."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One rank's end of a hop: a gloo group of two, whose collectives take turns on connections."""

    group: PairGroup
    connections: int
    is_upstream: bool

    def start(self, piece: torch.Tensor) -> Work:
        """Send the piece, or receive it, after those before; returns at once."""
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self.group.broadcast([piece], options)

    def cut(self) -> None:
        """Close the connections, so that gloo ends what is under way, and touches no tensor.

        gloo does so where a wait on a point-to-point work times out; a hop has no other use of
        those. Where a connection is closed already, that is well too.
        """
        for tag in range(self.connections):
            with suppress(RuntimeError):
                nothing = self.group.recv([torch.empty(1)], int(self.is_upstream), tag)
                nothing.wait(timedelta(milliseconds=1))


class ChunkSent:
    """The event of a chunk on its way to the next rank: once it has passed, its memory is free."""

    cuda_event = None

    def __init__(self, works: list[Work], wait: Callable[[Work, float], bool]) -> None:
        self._works = works
        self.passed_at = time.perf_counter()  # or later, when it is seen
        self._wait = wait

    def passed(self) -> bool:
        """Never blocks; raises RuntimeError where gloo failed to send it."""
        return self.passes_within(0.0)

    def passes_within(self, limit_s: float) -> bool:
        """Wait for it, but no longer; has it passed? Raises like `synchronize`."""
        deadline = time.monotonic() + limit_s
        while self._works and self._wait(self._works[0], deadline - time.monotonic()):
            self._works.pop(0)
            self.passed_at = time.perf_counter()
        return not self._works

    def synchronize(self) -> None:
        """Block until it has passed; raises the failure once there is one, else gloo's error."""
        while not self.passes_within(_LOOK_UP_EVERY_S):
            pass


class Chain:
    """This rank's place in the chains of all chunks; one thread uses it, in chunk order.

    `before` and `after` are the hops towards this rank and from it; None where no chunk passes.
    `check` raises why the transfer has failed, if it has. All ranks give the same `order`.
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
        self._arriving: deque[tuple[torch.Tensor, list[Work]]] = deque()
        self._under_way: deque[tuple[Work, Hop, torch.Tensor]] = deque()
        self._starting = threading.Lock()  # nothing is started once it is closed
        self._is_closed = False
        self.sent_nbytes = 0

    def begin(self, memory: torch.Tensor, root: int) -> None:
        """Be ready to receive the chunk, unless this rank is its root; nobody else may use it now.

        Call it for each chunk in order, as far ahead of `carry` as there are free slots.
        """
        before, _ = neighbours(self._order, root, self._rank)
        if before is not None:
            works = [self._start(self._before, piece) for piece in self._pieces(memory)]
            self._arriving.append((memory, works))

    def carry(self, memory: torch.Tensor, root: int) -> ChunkSent:
        """Block until the chunk is here, passing it on meanwhile; it may be read afterwards.

        And written again once the event that is returned has passed. Raises the failure once there
        is one, or RuntimeError where gloo failed first.
        """
        self._check()
        before, after = neighbours(self._order, root, self._rank)
        pieces = self._pieces(memory)
        arriving: list[Work] = []
        if before is not None:
            begun, arriving = self._arriving.popleft()
            assert begun.data_ptr() == memory.data_ptr(), "carried in another order than begun"
        leaving: list[Work] = []
        for i, piece in enumerate(pieces):
            if before is not None:
                self._await(arriving[i])
            if after is not None:
                leaving.append(self._start(self._after, piece))
                self.sent_nbytes += piece.numel()
        return ChunkSent(leaving, self._ends_within)

    def close(self) -> None:
        """Give up what is under way, which is so after a failure only; idempotent, any thread.

        Takes most of a second then. Neighbours that have not failed yet do so now: tell them why
        before. A work that does not end is kept with its memory until it does: gloo forgets one
        that is half sent or received when its connection ends, and leaves it to its timeout.
        """
        with self._starting:
            if self._is_closed:
                return
            self._is_closed = True
        release_ended()
        # The halves first, which end by themselves where the neighbours live. What is left then is
        # what one side alone has begun, and the cut ends that.
        if self._left() and not self._have_ended(_GRACE_S):
            for hop in (self._before, self._after):
                if hop is not None:
                    hop.cut()
            self._have_ended(_CUT_LIMIT_S)
        for work, hop, piece in self._left():
            keep(work, hop, piece)
        # The connections end here, not with the last slot that has an event of this chain.
        self._under_way.clear()
        self._arriving.clear()
        self._before = self._after = None

    def _left(self) -> list[tuple[Work, Hop, torch.Tensor]]:
        return [entry for entry in list(self._under_way) if not entry[0].is_completed()]

    def _have_ended(self, limit_s: float) -> bool:
        """Have all works, well or not, waited for together?"""
        deadline = time.monotonic() + limit_s
        for work, _, _ in self._left():
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        return not self._left()

    def _pieces(self, memory: torch.Tensor) -> Sequence[torch.Tensor]:
        """Of about equal size: no rest of a few bytes, which would cost as much as a piece."""
        count = max(1, memory.numel() // self._piece_nbytes)
        size = max(PAGE, align_up(-(-memory.numel() // count), PAGE))
        pieces: Sequence[torch.Tensor] = memory.split(size)
        return pieces

    def _start(self, hop: Hop | None, piece: torch.Tensor) -> Work:
        with self._starting:
            self._check_closed()
            assert hop is not None, "a chunk passes over a hop that was not connected"
            while self._under_way and self._under_way[0][0].is_completed():
                self._under_way.popleft()
            work = hop.start(piece)
            self._under_way.append((work, hop, piece))
        return work

    def _check_closed(self) -> None:
        if self._is_closed:
            raise RuntimeError("the chain has been closed")

    def _await(self, work: Work) -> None:
        while not self._ends_within(work, _LOOK_UP_EVERY_S):
            pass

    def _ends_within(self, work: Work, limit_s: float) -> bool:
        """Has the work ended, waited for? Raises the failure, or the work's own error."""
        if not work.is_completed():
            if limit_s <= 0:
                return False
            wait = timedelta(seconds=max(0.001, min(limit_s, _LOOK_UP_EVERY_S)))
            with suppress(RuntimeError):  # time is up, or gloo's error, which is known by then
                work.wait(wait)
                return True
            self._check()
            self._check_closed()
            if not work.is_completed():
                return False
        work.wait()
        return True
