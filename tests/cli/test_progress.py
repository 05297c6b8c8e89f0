"""Claims about what a person sees, and which process shows it."""

from __future__ import annotations

import io
import os
import pty
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from packcast.cli import progress
from packcast.cli.bottleneck import Bottleneck, joining_line
from packcast.cli.progress import (
    Display,
    JoiningLines,
    PlainLines,
    PlainView,
    SilentView,
    make_view,
)
from packcast.cli.rate import Meter, Rates, RateWindow, start_lines, time_left
from packcast.cli.richview import RichView, frame
from packcast.cli.terminal import TerminalLock, printable
from packcast.launch.launchers import Launch
from packcast.settings import Settings
from packcast.view import Joining, Snapshot, WorkerState

from .conftest import snapshot_of, start_of

ALONE = Launch("none", rank=0, world_size=1, local_rank=0, local_world_size=1)
SEND, RECV = Settings(command="send"), Settings(command="recv")


def rank_of(rank: int) -> Launch:
    return Launch("torchrun", rank=rank, world_size=4, local_rank=rank, local_world_size=4)


def test_the_rate_falls_to_zero_when_nothing_moves() -> None:
    window = RateWindow(0.0)
    assert window.add(1.0, 0) == 0
    assert window.add(2.0, 100) == 100
    assert window.add(3.0, 200) == 100
    assert 0 < window.add(6.0, 200) < 100
    assert window.add(11.0, 200) == 0
    assert time_left(snapshot_of(50), Rates(0.0, 20.0, {}, {})) == ""
    assert time_left(snapshot_of(50), Rates(10.0, 5.0, {}, {})) == "0:10 left"


def test_the_rate_begins_with_the_first_byte() -> None:
    window = RateWindow(0.0)
    for second in range(30):
        assert window.add(float(second), 0) == 0
    assert window.add(30.0, 100) == 100


def test_the_rate_is_of_the_last_seconds_only() -> None:
    window = RateWindow(0.0)
    for second in range(1, 20):
        window.add(float(second), second * 10)
    assert window.add(25.0, 190 + 600) == pytest.approx(100)


def test_the_time_left_does_not_jump_with_a_pause() -> None:
    meter = Meter(0.0)
    for second in range(61):
        moving = meter.rates(snapshot_of(10 * second, 10_000), float(second))
    for second in range(61, 66):
        paused = meter.rates(snapshot_of(600, 10_000), float(second))
    assert (moving.whole, paused.whole) == (10, 0)
    assert paused.lasting > 0.8 * moving.lasting


def test_plain_lines_are_neither_many_nor_absent() -> None:
    lines = PlainLines(0.0)
    fast = [lines.next_line(snapshot_of(done), done / 100) for done in range(100)]
    assert fast == [None] * 100
    moving = PlainLines(0.0)
    said = [moving.next_line(snapshot_of(second), float(second)) for second in range(101)]
    assert sum(line is not None for line in said) == 10
    slow = PlainLines(0.0)
    said = [slow.next_line(snapshot_of(second // 36), float(second)) for second in range(3600)]
    assert 80 < sum(line is not None for line in said) <= 100


def test_a_plain_line_says_how_far_how_fast_and_where() -> None:
    lines = PlainLines(-10.0)
    assert lines.next_line(snapshot_of(0, 8 << 30), 0.0) == "  0 %  0 B of 8.0 GiB  0.0 MB/s"
    line = lines.next_line(snapshot_of(2 << 30, 8 << 30), 10.0)
    assert line == " 25 %  2.0 of 8.0 GiB  0.21 GB/s  0:30 left"


def test_a_plain_line_names_the_slowest_rank_and_what_it_waits_for() -> None:
    lines = PlainLines(0.0, {1: "hosta", 2: "hostb"})
    slow = snapshot_of(20, 100, {1: 60, 2: 20}, rank_2="write")
    lines.next_line(slow, 1.0)
    lines.next_line(slow, 8.0)
    line = lines.next_line(slow, 13.0) or ""
    assert line.endswith("slowest rank 2 (hostb)  waiting on rank 2 (hostb): write, 12 s")


def test_an_empty_checkpoint_is_all_there() -> None:
    empty = Snapshot(0, 0, {}, {1: WorkerState(0)})
    text = drawn(empty, 80)
    assert "100%" in text


def test_of_many_workers_three_are_shown() -> None:
    workers = {rank: 10 * rank for rank in range(1, 11)}
    text = drawn(snapshot_of(10, workers=workers), 100)
    shown = [line.split()[:3] for line in text.splitlines() if " rank " in line]
    assert shown == [
        ["slowest", "rank", "1"],
        ["median", "rank", "6"],
        ["fastest", "rank", "10"],
    ]
    assert "10 workers, 1 done" in text


def test_each_of_few_workers_has_host_bytes_rate_and_state() -> None:
    snapshot = snapshot_of(5 << 20, 9 << 20, {1: 5 << 20, 2: 9 << 20}, rank_1="write")
    lines = drawn(snapshot, 100, {1: "hosta", 2: "hostb.example.org"}).splitlines()
    assert [lines[1].split()[:3], lines[1].split()[-6:]] == [
        ["rank", "1", "hosta"],
        ["55%", "5.0", "MiB", "5.2", "MB/s", "writing"],
    ]
    assert lines[2].split()[2] == "hostb"
    assert lines[2].split()[-1] == "done"


def test_of_a_long_host_name_the_end_is_shown() -> None:
    hosts = {rank: f"job-of-somebody-worker-{rank}" for rank in (1, 2)}
    snapshot = snapshot_of(5 << 20, 9 << 20, {1: 5 << 20, 2: 9 << 20})
    shown = [line.split()[2] for line in drawn(snapshot, 80, hosts).splitlines()[1:3]]
    assert [name[0] + name[-9:] for name in shown] == ["~-worker-1", "~-worker-2"]
    assert hosts[1] in drawn(snapshot, 160, hosts)


def test_the_columns_stay_where_they_are() -> None:
    begin, later = (
        drawn(snapshot_of(done, 100 << 30, {1: done}, rank_1=stage), 80).splitlines()[0]
        for done, stage in ((0, ""), (50 << 30, "write"))
    )
    assert begin.index(" of 100 GiB") == later.index(" of 100 GiB")


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_the_bars_fit_their_terminal(width: int) -> None:
    hosts = dict.fromkeys(range(1, 13), "node-of-a-cluster.with.a.long.example.name")
    for ranks in (1, 3, 12):
        workers = dict.fromkeys(range(1, ranks + 1), 3 << 30)
        snapshot = snapshot_of(3 << 30, 5 << 30, workers, rank_1="write")
        text = drawn(snapshot, width, hosts)
        assert all(len(line) <= width for line in text.splitlines())
        assert "60%" in text
        assert ("GiB" in text) == (width >= 60)
        assert (" left" in text) == (width >= 80)
        assert "waiting on rank 1" in text


def test_a_terminal_without_unicode_gets_bars_of_ascii() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    draw(snapshot_of(50), Console(file=out, width=80))
    out.flush()
    assert b"----" in out.buffer.getvalue()  # type: ignore[attr-defined]


def drawn(snapshot: Snapshot, width: int, hosts: dict[int, str] | None = None) -> str:
    out = io.StringIO()
    draw(snapshot, Console(file=out, width=width), hosts or {})
    return out.getvalue()


def draw(snapshot: Snapshot, console: Console, hosts: dict[int, str] | None = None) -> None:
    """The screen after three seconds, of which the last moved all bytes."""
    meter, hold_up = Meter(2.0), Bottleneck()
    for second in range(4):
        hold_up.add(snapshot, float(second))
    meter.rates(replace(snapshot, nbytes_done=0, workers={}), 2.0)
    rates = meter.rates(snapshot, 3.0)
    console.print(frame("sending", snapshot, rates, hold_up, 3.0, console.width, hosts=hosts or {}))


def test_the_start_line_says_what_to_whom_over_what_and_why() -> None:
    assert start_lines(start_of()) == [
        "sending 2 files, 7 tensors, 1.0 GiB to 3 workers",
        "  gloo on cpu (no GPU on host-a); 4 buffers of 16MiB",
    ]
    on_gpu = replace(start_of(), device="cuda:0")
    assert start_lines(on_gpu)[1].endswith("; 4 buffers of 16MiB, staging 512MiB")


def test_a_verbose_start_line_says_which_io_threads_read_and_write() -> None:
    assert start_lines(start_of(), verbose=True)[1].endswith(" of 16MiB, native I/O threads")


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


def test_unused_gpus_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    Display(SEND, ALONE).started(start_of(loud=True), lambda: snapshot_of(0))
    assert "packcast: warning: no GPU is used: no GPU on host-a" in capsys.readouterr().err


def test_quiet_says_only_what_workers_must_run(capsys: pytest.CaptureFixture[str]) -> None:
    view = make_view("auto", SEND, ALONE, quiet=True)
    view.joining(Joining(1, 2, (2,), "rank 1", 300.0))
    view.note("on the way")
    view.warn("odd")
    view.started(start_of(loud=True), lambda: snapshot_of(0))
    view.ended("end")
    assert capsys.readouterr().err == ""
    view.listening("packcast recv h:1")
    assert "packcast recv h:1" in capsys.readouterr().err


def test_progress_none_says_how_it_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = make_view("none", SEND, ALONE)
    view.joining(Joining(1, 2, (2,), "rank 1", 300.0))
    view.note("on the way")
    view.started(start_of(), lambda: snapshot_of(0))
    assert capsys.readouterr().err == ""
    view.warn("odd")
    view.ended("end")
    assert capsys.readouterr().err == "packcast: warning: odd\nend\n"


def test_bars_need_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_view("rich", SEND, ALONE), PlainView)
    assert type(make_view("none", SEND, ALONE)) is SilentView
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


def test_bars_begin_at_once_and_follow_without_a_blank(
    terminal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # captured, and drawn on all the same
    view = RichView(SEND, ALONE)
    view.joining(Joining(0, 300, (), None, 300.0))
    assert "0 of 300 workers" in capsys.readouterr().err
    for joined in range(1, 300):
        view.joining(Joining(joined, 300, (), None, 300.0))
    # Nothing is erased: at most, the thread that refreshes has drawn meanwhile.
    assert capsys.readouterr().err.count("of 300 workers") < 100
    view.close()


def test_a_display_closes_from_any_thread() -> None:
    view = PlainView(SEND, ALONE)
    view.started(start_of(), lambda: snapshot_of(1))
    thread = threading.Thread(target=view.close)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_a_log_names_few_workers_as_they_come_and_counts_many() -> None:
    few = JoiningLines(Joining(0, 2, (1, 2), None, 300.0), 0.0)
    assert few.update(Joining(1, 2, (2,), "rank 1 (h, pid 1)", 300.0)) == [
        "rank 1 (h, pid 1) joined, 1 of 2"
    ]
    missing = tuple(range(3, 601))
    many = JoiningLines(Joining(0, 600, (), None, 300.0), 0.0)
    assert many.update(Joining(2, 600, missing, "rank 2", 300.0)) == []
    said = [many.next_line(float(second)) for second in range(11)]
    assert said[:10] == [None] * 10
    assert said[10] == (
        "2 of 600 workers joined; waiting for ranks 3, 4, 5, 6 and 594 more, up to 4:50"
    )


def test_without_a_launcher_the_host_that_joined_last_is_named() -> None:
    assert joining_line(Joining(0, 1, (), None, 65.0), 5.0) == (
        "0 of 1 worker joined; waiting up to 1:00"
    )
    newest = Joining(1, 3, (), "a worker (node2, pid 7)", 65.0, "node2")
    assert (
        joining_line(newest, 5.0) == "1 of 3 workers joined, the last on node2; waiting up to 1:00"
    )
