"""Claims about what a person sees, and which process shows it."""

from __future__ import annotations

import io
import os
import pty
import sys
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from packcast.cli import progress
from packcast.cli.progress import Display, PlainLines, PlainView, make_view
from packcast.cli.rate import RateWindow, start_lines, time_left, workers_line
from packcast.cli.richview import Meter, RichView, frame
from packcast.cli.terminal import TerminalLock, printable
from packcast.group.launch import Launch
from packcast.settings import Settings
from packcast.view import Snapshot

from .conftest import snapshot_of, start_of

ALONE = Launch("none", rank=0, world_size=1, local_rank=0, local_world_size=1)
SEND, RECV = Settings(command="send"), Settings(command="recv")


def rank_of(rank: int) -> Launch:
    return Launch("torchrun", rank=rank, world_size=4, local_rank=rank, local_world_size=4)


def test_the_rate_falls_to_zero_when_nothing_moves() -> None:
    window = RateWindow(0.0)
    assert window.add(1.0, 100) == 100
    assert window.add(2.0, 200) == 100
    assert 0 < window.add(5.0, 200) < 100
    assert window.add(10.0, 200) == 0
    assert time_left(snapshot_of(50), 0.0) == ""


def test_the_rate_is_of_the_last_seconds_only() -> None:
    window = RateWindow(0.0)
    for second in range(1, 20):
        window.add(float(second), second * 10)
    assert window.add(25.0, 190 + 600) == pytest.approx(100)


def test_plain_lines_are_neither_many_nor_absent() -> None:
    lines = PlainLines(0.0)
    fast = [lines.next_line(snapshot_of(done), done / 100) for done in range(100)]
    assert fast == [None] * 100
    slow = PlainLines(0.0)
    said = [slow.next_line(snapshot_of(second // 36), float(second)) for second in range(3600)]
    assert 50 < sum(line is not None for line in said) <= 60


def test_a_plain_line_says_how_far_how_fast_and_where() -> None:
    line = PlainLines(0.0).next_line(snapshot_of(2 << 30, 8 << 30), 10.0)
    assert line == " 25 %  2.0 of 8.0 GiB  0.21 GB/s  30 s left  m.safetensors"


def test_an_empty_checkpoint_is_all_there() -> None:
    empty = Snapshot(0, 0, {}, {1: 0}, "")
    text = drawn(empty, 80)
    assert "100%" in text


def test_many_workers_are_one_line() -> None:
    workers = {rank: 10 * rank for rank in range(1, 11)}
    line = workers_line(workers, 100)
    assert line == "10 workers, 1 done; slowest rank 1 at 10 %, fastest rank 10 at 100 %"
    assert line in drawn(snapshot_of(50, workers=workers), 100)
    assert "rank 2 " in drawn(snapshot_of(50, workers={1: 5, 2: 6}), 100)


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_bars_fit_their_terminal(width: int) -> None:
    text = drawn(snapshot_of(3 << 30, 5 << 30, {1: 1 << 30}), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "60%" in text
    assert ("GiB" in text) == (width >= 60)
    assert (" left" in text) == (width >= 120)


def drawn(snapshot: Snapshot, width: int) -> str:
    out = io.StringIO()
    rates = Meter(0.0).rates(snapshot, 1.0)
    Console(file=out, width=width).print(frame("sending", snapshot, rates, width))
    return out.getvalue()


def test_the_start_line_says_what_to_whom_over_what_and_why() -> None:
    assert start_lines(start_of()) == [
        "sending 2 files, 7 tensors, 1.0 GiB to 3 workers",
        "  gloo on cpu (no GPU on host-a); 4 buffers of 16MiB, staging 512MiB",
    ]


def test_a_verbose_start_line_says_which_io_threads_read_and_write() -> None:
    assert start_lines(start_of(), verbose=True)[1].endswith(", staging 512MiB, native I/O threads")


def test_control_characters_reach_no_terminal() -> None:
    assert printable("a\x1b[2Jb\rc\ud800d\ne") == "a\\x1b[2Jb\\rc\\ud800d\ne"


@pytest.mark.parametrize(
    ("settings", "launch", "is_sender", "speaks"),
    [
        (SEND, rank_of(0), True, True),
        (SEND, rank_of(1), False, False),
        (RECV, rank_of(0), False, True),
        (RECV, rank_of(1), False, False),
        (RECV, ALONE, False, True),
    ],
)
def test_into_a_file_one_rank_of_a_launch_speaks(
    settings: Settings,
    launch: Launch,
    is_sender: bool,
    speaks: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = PlainView(settings, launch)
    view.started(start_of(is_sender=is_sender, rank=launch.rank), lambda: snapshot_of(0))
    view.close()
    view.ended("end")
    view.warn("odd")
    err = capsys.readouterr().err
    assert ("2 files" in err, "end" in err) == (speaks, speaks)
    assert "packcast: warning: odd" in err
    assert "\x1b" not in err


def test_gpus_that_are_not_used_are_said_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    Display(SEND, ALONE).started(start_of(loud=True), lambda: snapshot_of(0))
    assert "packcast: warning: no GPU is used: no GPU on host-a" in capsys.readouterr().err


def test_quiet_says_only_what_workers_must_run(capsys: pytest.CaptureFixture[str]) -> None:
    view = make_view("auto", SEND, ALONE, quiet=True)
    view.joined("rank 1", 1, 2)
    view.warn("odd")
    view.started(start_of(loud=True), lambda: snapshot_of(0))
    view.ended("end")
    assert capsys.readouterr().err == ""
    view.listening("packcast recv h:1")
    assert "packcast recv h:1" in capsys.readouterr().err


def test_bars_need_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_view("rich", SEND, ALONE), PlainView)
    assert type(make_view("none", SEND, ALONE)) is Display
    monkeypatch.setattr(progress, "can_draw", lambda: True)
    assert isinstance(make_view("auto", SEND, ALONE), RichView)
    assert isinstance(make_view("plain", SEND, ALONE), PlainView)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let locks be taken on a terminal that is ours."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    monkeypatch.setattr("packcast.cli.terminal.os.ttyname", lambda fd: name)
    monkeypatch.setattr(progress, "can_draw", lambda: True)
    yield name
    os.close(ours)
    os.close(theirs)


def test_a_terminal_has_one_renderer_and_the_next_one_when_that_is_gone(terminal: str) -> None:
    first, second = TerminalLock(), TerminalLock()
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    first.release()
    first.release()
    assert second.acquire()
    second.release()


def test_on_a_terminal_the_sender_speaks_and_not_its_workers(
    terminal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sender = Display(SEND, rank_of(0))
    worker = Display(SEND, rank_of(1))
    for rank, view in ((1, worker), (0, sender)):
        view.started(start_of(is_sender=rank == 0, rank=rank), lambda: snapshot_of(0))
    sender.close()
    sender.ended("sent")
    worker.ended("received")
    err = capsys.readouterr().err
    assert "sending" in err
    assert "sent" in err
    assert "receiv" not in err


def test_the_bars_leave_standard_output_alone(
    terminal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    view = RichView(SEND, ALONE)
    before = sys.stdout
    view.started(start_of(), lambda: snapshot_of(40, workers={1: 30}))
    assert sys.stdout is before
    view.phase("publish")
    view.warn("[bold]odd")
    view.close()
    view.close()
    view.ended("end")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[bold]odd" in captured.err


def test_a_display_closes_from_any_thread() -> None:
    view = PlainView(SEND, ALONE)
    view.started(start_of(), lambda: snapshot_of(1))
    thread = threading.Thread(target=view.close)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
