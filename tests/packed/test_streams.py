"""Streams and events on a CPU, and the clock that turns pairs of events into counted stages."""

from __future__ import annotations

import time

import pytest
import torch

from packcast.packed.counters import Counters
from packcast.packed.streams import Stream, StreamEvent, StreamTimer

CPU = torch.device("cpu")


class LateEvent(StreamEvent):
    """Like a GPU's: passed when the test says so."""

    def __init__(self) -> None:
        super().__init__(None)
        self.is_passed = False
        self.waited_for = 0

    def passed(self) -> bool:
        return self.is_passed

    def synchronize(self) -> None:
        self.waited_for += 1


def test_an_event_on_a_cpu_has_been_passed_when_it_is_made() -> None:
    before = time.perf_counter()
    with Stream(CPU) as stream:
        event = stream.record()
    assert event.passed()
    assert event.cuda_event is None
    assert before <= event.passed_at <= time.perf_counter()
    event.synchronize()


def test_a_span_that_is_not_over_waits_without_the_host_and_keeps_the_order() -> None:
    counters = Counters(trace=True)
    clock, begin, late = StreamTimer(CPU, counters), StreamEvent(None), LateEvent()
    clock.span("h2d", 0, 1, begin, late)
    clock.span("d2h", 0, 1, begin, StreamEvent(None))
    clock.collect()
    assert counters.trace() == []
    assert late.waited_for == 0
    late.is_passed = True
    clock.collect()
    assert [event.stage for event in counters.trace()] == ["h2d", "d2h"]


def test_at_the_end_every_span_is_waited_for_and_counted_once() -> None:
    counters = Counters(trace=True)
    clock, late = StreamTimer(CPU, counters), [LateEvent(), LateEvent()]
    for i, event in enumerate(late):
        clock.span("d2h", i, 5, StreamEvent(None), event)
    clock.collect(wait=True)
    clock.collect(wait=True)
    assert [event.chunk for event in counters.trace()] == [0, 1]
    assert [event.waited_for for event in late] == [1, 1]
    assert counters.nbytes("d2h") == 10


def test_a_stream_that_is_not_timed_records_no_begin_and_counts_nothing() -> None:
    stream, counters = Stream(CPU), Counters(trace=True)
    assert stream.begin() is not None
    stream.timed = False
    assert stream.begin() is None
    StreamTimer(CPU, counters).span("h2d", 0, 1, stream.begin(), stream.record())
    assert counters.trace() == []


class FakeEvent:
    """As torch's, without a GPU."""

    made = 0

    def __init__(self, **options: bool) -> None:
        FakeEvent.made += 1
        self.recorded: list[object] = []
        self.options = options

    def record(self, stream: object) -> None:
        self.recorded.append(stream)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """A stream of fake events."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", 0)
    stream = Stream(CPU)
    monkeypatch.setattr(stream, "_stream", "a stream")
    return stream


def test_cuda_events_are_used_again_once_their_event_is_gone(fake: Stream) -> None:
    stream = fake
    first, second = stream.record(), stream.record()
    event = first.cuda_event
    assert event is not second.cuda_event
    assert FakeEvent.made == 2
    del first
    assert stream.record().cuda_event is event  # and given back at once
    third = stream.record()
    assert third.cuda_event is event
    assert stream.record().cuda_event not in (event, second.cuda_event)
    assert FakeEvent.made == 3


def test_an_event_without_a_time_is_not_used_for_one_with_it(fake: Stream) -> None:
    for timed in (False, True, False, True):
        fake.timed = timed
        event = fake.record().cuda_event
        assert isinstance(event, FakeEvent)
        assert event.options["enable_timing"] is timed
