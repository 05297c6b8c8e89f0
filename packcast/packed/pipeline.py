"""The one loop: every rank runs it over the same chunks, and each chunk names who sends it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypeVar

from packcast.packed.counters import Stage
from packcast.packed.ring import Broadcast, Carried, Ring, Slot

C = TypeVar("C", bound=Carried)
C_in = TypeVar("C_in", bound=Carried, contravariant=True)


class Source(Protocol[C_in]):
    """Where the producer's bytes come from."""

    def fill(self, chunk: C_in, slot: Slot) -> None:
        """Give the chunk and its trailer to the fill stream; leaves `slot.filled`."""

    def close(self) -> None:
        """End its threads; idempotent, also after a failure."""


class Drain(Protocol[C_in]):
    """Where the consumer's bytes go."""

    @property
    def stage(self) -> Stage:
        """What the loop waits for when it waits here."""

    def drain(self, chunk: C_in, slot: Slot) -> None:
        """Give the chunk to the drain stream and to whoever uses it then; leaves `slot.drained`."""

    def finish(self) -> None:
        """Block until every byte is where it belongs; raises what went wrong on the way."""

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

    A rank that is nobody's root needs no source; one without a drain drops what it receives.
    Read, copy, broadcast and write overlap, as far as there are slots and staging. On a CPU
    `begin` is called, in order, for each chunk that has its slot, up to a ring ahead of the
    broadcasts. Returns when the last byte is through on this rank: the moment, by
    `time.perf_counter()`, before the ends were closed. Errors of source and drain are raised as
    they are; the other ranks are then left waiting, so the caller has to tell them, or to mend it:
    `on_failure` is called first of all.
    """
    with ExitStack() as ending:
        for end in (source, drain):
            if end is not None:
                ending.callback(end.close)
        if on_failure is not None:
            ending.enter_context(_told(on_failure))
        cpu_begin = time.thread_time()
        for chunk, slot in _with_slots(chunks, ring, drain.stage if drain else "read", begin):
            if chunk.root == rank and source is not None:
                source.fill(chunk, slot)
            ring.broadcast(chunk, slot, broadcast)
            if drain is not None:
                drain.drain(chunk, slot)
        # Where the host runs ahead of the streams, what is still on them is waited for here.
        with ring.counters.waiting_on("broadcast"):
            ring.synchronize()
        if drain is not None:
            drain.finish()
        ring.counters.loop_seconds = time.thread_time() - cpu_begin
        return time.perf_counter()


def _with_slots(
    chunks: Iterable[C], ring: Ring, stage: Stage, begin: Callable[[C, Slot], object] | None
) -> Iterator[tuple[C, Slot]]:
    """Each chunk with its slot; with `begin`, slots that are free already are taken ahead."""
    ahead: deque[tuple[C, Slot]] = deque()
    for chunk in chunks:
        while ahead and (len(ahead) == ring.num_slots or not ring.is_free(chunk)):
            yield ahead.popleft()
        with ring.counters.waiting_on("broadcast"):
            ring.await_sent(chunk)
        with ring.counters.waiting_on(stage):
            slot = ring.take(chunk)
        if begin is None or not ring.is_host:
            yield chunk, slot
        else:
            begin(chunk, slot)
            ahead.append((chunk, slot))
    yield from ahead


@contextmanager
def _told(on_failure: Callable[[BaseException], object]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        on_failure(error)
        raise
