"""Streams and events, also for the CPU, where the caller's own thread is the stream.

A stream does its work in order; an event is a point in it that another stream or the host waits for.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Protocol

import torch

from packcast.packed.counters import Counters, Stage

_POLL_S = 0.001


class Completion(Protocol):
    """A point that is passed sooner or later: in a stream, or by host threads."""

    @property
    def cuda_event(self) -> torch.cuda.Event | None:
        """For a stream to wait for; None where it is the host's business."""

    @property
    def passed_at(self) -> float:
        """When it was passed, by `time.perf_counter()`; where there is no event."""

    def passed(self) -> bool:
        """Has it been? Never blocks."""

    def synchronize(self) -> None:
        """Block this host thread until it has been."""


class StreamEvent:
    """A point in a stream. On a CPU it has been passed when it exists."""

    __slots__ = ("_event", "_passed_at", "_spare")

    def __init__(
        self,
        stream: torch.cuda.Stream | None,
        *,
        timed: bool = True,
        spare: list[torch.cuda.Event] | None = None,
    ) -> None:
        self._event: torch.cuda.Event | None = None
        self._passed_at = 0.0
        self._spare = spare
        if stream is None:
            self._passed_at = time.perf_counter()
            return
        self._event = _taken_from(spare) or _new_event(timed=timed)
        self._event.record(stream)

    def __del__(self) -> None:
        # Nobody holds it, so nobody can begin to wait for it any more. Streams that wait already
        # wait for the point that it was, whatever is recorded next.
        if self._spare is not None and self._event is not None:
            self._spare.append(self._event)

    @property
    def cuda_event(self) -> torch.cuda.Event | None:
        return self._event

    @property
    def passed_at(self) -> float:
        """When it was passed, by `time.perf_counter()`; for a CPU's event only."""
        return self._passed_at

    def passed(self) -> bool:
        """Has the stream got here? Never blocks."""
        return self._event is None or bool(self._event.query())

    def passes_within(self, limit_s: float) -> bool:
        """Wait for the stream to get here, but no longer; has it?"""
        deadline = time.monotonic() + limit_s
        while not self.passed():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def synchronize(self) -> None:
        """Block this host thread until the stream has got here."""
        if self._event is not None:
            self._event.synchronize()


def _taken_from(spare: list[torch.cuda.Event] | None) -> torch.cuda.Event | None:
    try:
        return spare.pop() if spare else None
    except IndexError:  # another thread was faster
        return None


def _new_event(*, timed: bool) -> torch.cuda.Event:
    # blocking: a host thread that waits sleeps; spinning would take cores from the readers.
    return torch.cuda.Event(enable_timing=timed, blocking=True)


class Stream:
    """A CUDA stream; used as a context manager it is the current stream of the calling thread.

    What is given to an `urgent` one begins before what others are given, where both could. The
    events of one that is not `timed` tell that they are passed, but not when.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        priority = -1 if urgent else 0
        self.timed = True
        self._stream = torch.cuda.Stream(device, priority) if device.type == "cuda" else None
        self._entered: list[torch.cuda.StreamContext] = []
        # CUDA events of events that are gone, to be used again: those that tell times, and others.
        self._spare: dict[bool, list[torch.cuda.Event]] = {True: [], False: []}

    def __enter__(self) -> Stream:
        if self._stream is not None:
            context = torch.cuda.stream(self._stream)
            context.__enter__()
            self._entered.append(context)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._entered.pop().__exit__(kind, error, traceback)

    def record(self) -> StreamEvent:
        """Record an event at the end of what has been given to the stream so far."""
        return StreamEvent(self._stream, timed=self.timed, spare=self._spare[self.timed])

    def begin(self) -> StreamEvent | None:
        """Record an event where a span begins that is to be timed; None where nothing is."""
        return self.record() if self.timed else None

    def wait(self, event: Completion | None) -> None:
        """What is given to this stream from now on begins after `event`; the host does not wait."""
        if self._stream is not None and event is not None and event.cuda_event is not None:
            self._stream.wait_event(event.cuda_event)

    def wait_for_caller(self, device: torch.device) -> None:
        """Begin after everything already on the caller's current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def is_idle(self) -> bool:
        """Is everything done that the stream was given? Never blocks."""
        return self._stream is None or bool(self._stream.query())

    def synchronize(self) -> None:
        """Block this host thread until the stream is empty."""
        if self._stream is not None:
            self._stream.synchronize()


def record_caller_stream(device: torch.device) -> StreamEvent:
    """Record an event at the end of what the caller's current stream has been given so far."""
    return StreamEvent(torch.cuda.current_stream(device) if device.type == "cuda" else None)


def make_caller_wait(device: torch.device, event: Completion | None) -> None:
    """What the caller's current stream is given from now on begins after `event`."""
    if event is not None and event.cuda_event is not None:
        torch.cuda.current_stream(device).wait_event(event.cuda_event)


class StreamTimer:
    """Turns pairs of events into counted stages, without ever making the host wait in the loop.

    Without counters it does nothing.
    """

    def __init__(self, device: torch.device, counters: Counters | None) -> None:
        self._counters = counters
        self._open: deque[tuple[Stage, int, int, Completion, Completion]] = deque()
        self._base: StreamEvent | None = None
        if device.type == "cuda" and counters is not None:
            self._base = StreamEvent(torch.cuda.current_stream(device))
            self._base.synchronize()
        self._base_at = time.perf_counter()

    def span(
        self, stage: Stage, chunk: int, nbytes: int, begin: Completion | None, end: Completion
    ) -> None:
        """Count `stage` from `begin` to `end` once the stream has passed them."""
        if self._counters is not None and begin is not None:
            self._open.append((stage, chunk, nbytes, begin, end))
            self.collect()

    def collect(self, *, wait: bool = False) -> None:
        """Count the spans that are over; with `wait`, all of them."""
        while self._counters and self._open:
            stage, chunk, nbytes, begin, end = self._open[0]
            if wait:
                end.synchronize()
            elif not end.passed():
                return
            self._open.popleft()
            self._counters.add(stage, chunk, nbytes, self._when(begin), self._when(end))

    def _when(self, event: Completion) -> float:
        if self._base is None or self._base.cuda_event is None or event.cuda_event is None:
            return event.passed_at
        return self._base_at + float(self._base.cuda_event.elapsed_time(event.cuda_event)) / 1e3
