"""Streams and events of a device; on a CPU, the caller's thread is the stream."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

import torch

from packcast.packed.counters import Counters, Stage

_POLL_S = 0.001


class Completion(Protocol):
    """A point that a stream or host threads will pass."""

    @property
    def cuda_event(self) -> torch.cuda.Event | None:
        """What a stream waits for; None if only the host can wait."""

    @property
    def passed_at(self) -> float:
        """When it was passed, by `time.perf_counter()`; only without `cuda_event`."""

    def passed(self) -> bool:
        """Whether it has been passed. Never blocks."""

    def synchronize(self) -> None:
        """Block this host thread until it has been passed."""


class StreamEvent:
    """A point in a stream. On a CPU it has been passed when it is made."""

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
        self._spare = [] if spare is None else spare
        if stream is None:
            self._passed_at = time.perf_counter()
            return
        try:
            self._event = self._spare.pop()
        except IndexError:  # no spare one
            # blocking: a host thread that waits sleeps; spinning would take cores from the readers.
            self._event = torch.cuda.Event(enable_timing=timed, blocking=True)
        self._event.record(stream)

    def __del__(self) -> None:
        # Without a reference nothing new can wait for it, and streams that already wait keep
        # waiting for the point recorded before, even if the event is recorded again.
        if self._event is not None:
            self._spare.append(self._event)

    @property
    def cuda_event(self) -> torch.cuda.Event | None:
        return self._event

    @property
    def handle(self) -> int:
        """CUDA's own, for functions of its driver."""
        assert self._event is not None, "an event of a CPU has no handle"
        return int(self._event.cuda_event)

    @property
    def passed_at(self) -> float:
        return self._passed_at

    def passed(self) -> bool:
        return self._event is None or bool(self._event.query())

    def passes_within(self, limit_s: float) -> bool:
        """Wait at most `limit_s` for it; whether it has been passed."""
        deadline = time.monotonic() + limit_s
        while not self.passed():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Stream:
    """A CUDA stream; as a context manager, for one thread at a time, its current stream.

    Work on an `urgent` stream starts before work on others. If `timed` is False, its events carry
    no time.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        priority = -1 if urgent else 0
        self.timed = True
        self._stream = torch.cuda.Stream(device, priority) if device.type == "cuda" else None
        self._before: list[tuple[int, tuple[int, int, int]]] = []  # current device and stream
        # CUDA events to use again, with and without times.
        self._spare: dict[bool, list[torch.cuda.Event]] = {True: [], False: []}

    def __enter__(self) -> Stream:
        # torch.cuda.stream does the same in five times as long, three times for each chunk.
        if (stream := self._stream) is not None:
            current = torch._C._cuda_getCurrentStream(stream.device_index)
            self._before.append((torch._C._cuda_getDevice(), current))
            torch._C._cuda_setStream(stream.stream_id, stream.device_index, stream.device_type)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            device, current = self._before.pop()
            torch._C._cuda_setStream(*current)
            if device != self._stream.device_index:
                torch._C._cuda_setDevice(device)

    @property
    def handle(self) -> int:
        """CUDA's own, for functions of its driver."""
        assert self._stream is not None, "a CPU has no streams"
        return int(self._stream.cuda_stream)

    def record(self) -> StreamEvent:
        """Record an event after the work enqueued so far."""
        return StreamEvent(self._stream, timed=self.timed, spare=self._spare[self.timed])

    def untimed(self) -> StreamEvent:
        """The same, for an event that is only asked whether it has been passed."""
        return StreamEvent(self._stream, timed=False)

    def begin(self) -> StreamEvent | None:
        """Record the begin of a span if the stream is timed."""
        return self.record() if self.timed else None

    def wait(self, event: Completion | None) -> None:
        """Work enqueued from now on starts after `event`; the host does not wait."""
        if self._stream is not None and event is not None and event.cuda_event is not None:
            self._stream.wait_event(event.cuda_event)

    def wait_for_caller(self, device: torch.device) -> None:
        """Work enqueued from now on starts after everything on the caller's current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def hold(self, memory: Iterable[torch.Tensor]) -> None:
        """Keep memory of another stream from reuse, once dropped, until the work enqueued so far is
        done."""
        if self._stream is not None:
            for tensor in memory:
                tensor.record_stream(self._stream)

    def is_idle(self) -> bool:
        """Whether all enqueued work is done. Never blocks."""
        return self._stream is None or bool(self._stream.query())

    def synchronize(self) -> None:
        """Block this host thread until the stream is empty."""
        if self._stream is not None:
            self._stream.synchronize()


def record_caller_stream(device: torch.device) -> StreamEvent:
    """Record an event after the work enqueued so far on the caller's current stream."""
    return StreamEvent(torch.cuda.current_stream(device) if device.type == "cuda" else None)


def make_caller_wait(device: torch.device, event: Completion | None) -> None:
    """Work enqueued from now on on the caller's current stream starts after `event`."""
    if event is not None and event.cuda_event is not None:
        torch.cuda.current_stream(device).wait_event(event.cuda_event)


class StreamTimer:
    """Counts stages by pairs of events; the host never waits in the loop. Needs counters."""

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
