"""The one loop: every rank runs it over the same chunks, and each chunk names its root."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Protocol, TypeVar

from packcast.packed.counters import Stage
from packcast.packed.ring import Broadcast, Carried, Ring, Slot

C = TypeVar("C", bound=Carried)
C_in = TypeVar("C_in", bound=Carried, contravariant=True)


class Source(Protocol[C_in]):
    """Where the producer's bytes come from."""

    def fill(self, chunk: C_in, slot: Slot) -> None:
        """Enqueue the copy of the chunk and its trailer on the fill stream; sets `slot.filled`."""

    def close(self) -> None:
        """End its threads; idempotent, also after a failure."""


class Drain(Protocol[C_in]):
    """Where the consumer's bytes go."""

    @property
    def stage(self) -> Stage:
        """The stage that the loop waits for when it waits for the drain."""

    def drain(self, chunk: C_in, slot: Slot) -> None:
        """Enqueue the copy of the chunk on the drain stream; sets `slot.drained`."""

    def finish(self) -> None:
        """Block until every byte is at its destination; raises what failed."""

    def close(self) -> None:
        """End its threads; idempotent, also after a failure."""


def run_pipeline(
    chunks: Iterable[C],
    *,
    rank: int,
    ring: Ring,
    broadcast: Broadcast,
    source: Source[C] | None,
    drain: Drain[C] | None,
    begin: Callable[[C, Slot], object] | None = None,
    on_failure: Callable[[BaseException], object] | None = None,
) -> float:
    """Move `chunks` through the ring; all ranks call this with the same chunks.

    A rank that is no root needs no source; one without a drain drops what it receives. Read, copy,
    broadcast and write overlap as far as slots and staging allow. On a CPU, `begin` is called in
    order for each chunk that has its slot, up to a ring ahead of the broadcasts. Returns the time
    (`time.perf_counter()`) when the last byte was through on this rank, before source and drain
    were closed. Errors of source and drain are raised unchanged, and the other ranks are then left
    waiting: `on_failure` is called first, before anything is closed, to notify them.
    """
    with ExitStack() as closing:
        for end in (source, drain):
            if end is not None:
                closing.callback(end.close)
        try:
            cpu_begin = time.thread_time()
            stage: Stage = drain.stage if drain else "broadcast"
            for chunk, slot in _with_slots(chunks, ring, stage, begin):
                if chunk.root == rank and source is not None:
                    source.fill(chunk, slot)
                ring.broadcast(chunk, slot, broadcast)
                if drain is not None:
                    drain.drain(chunk, slot)
            # Where the host runs ahead of the streams, it waits here for the rest of their work.
            with ring.counters.waiting_on("broadcast"):
                ring.synchronize()
            if drain is not None:
                drain.finish()
            ring.counters.loop_seconds = time.thread_time() - cpu_begin
            return time.perf_counter()
        except BaseException as error:
            if on_failure is not None:
                on_failure(error)
            raise


def _with_slots(
    chunks: Iterable[C], ring: Ring, stage: Stage, begin: Callable[[C, Slot], object] | None
) -> Iterator[tuple[C, Slot]]:
    """Each chunk with its slot; with `begin`, slots that are free already are taken ahead."""
    if not ring.is_host:  # streams wait, not the loop
        yield from ((chunk, ring.take(chunk)) for chunk in chunks)
        return
    ahead: deque[tuple[C, Slot]] = deque()
    for chunk in chunks:
        while ahead and (len(ahead) == ring.num_slots or not ring.is_free(chunk)):
            yield ahead.popleft()
        with ring.counters.waiting_on("broadcast"):
            ring.await_sent(chunk)
        with ring.counters.waiting_on(stage):
            slot = ring.take(chunk)
        if begin is None:
            yield chunk, slot
        else:
            begin(chunk, slot)
            ahead.append((chunk, slot))
    yield from ahead
