"""Progress of a transfer as lines; `cli/richview.py` draws bars. Reads snapshots; no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from packcast.cli.bottleneck import MAX_ROWS, Bottleneck, joining_line, slowest_of
from packcast.cli.options import ProgressMode
from packcast.cli.rate import Meter, done_of, percent, start_lines, time_left
from packcast.cli.terminal import TerminalLock, can_draw, say
from packcast.launch.launchers import Launch
from packcast.settings import Settings
from packcast.units import format_speed
from packcast.view import Joining, Phase, Snapshot, Start, View

POLL_S = 0.25
LINE_EVERY_PERCENT = 10
LEAST_PAUSE_S = 1.0
LINE_EVERY_S, LINE_EVERY_LATER_S = 10.0, 60.0
OFTEN_FOR_S = 300.0


class Display(View):
    """Decides whether this process prints, and prints warnings, the workers' command line and the
    summary. `cli/outcome.py` prints errors, after `close`.
    """

    _shows_notes = True  # also the start lines

    def __init__(self, settings: Settings, launch: Launch, *, quiet: bool = False) -> None:
        self.start: Start | None = None
        self.verbose = False
        self._spoke = False
        # Until `placed` or `started` corrects it: a lower rank may have run `recv`.
        self.is_sender = settings.command == "send" and launch.rank == 0
        self._quiet = quiet
        self._on_terminal = can_draw()
        # In a log file only one rank per host writes, as all would write the same lines.
        on_first_host = settings.command == "send" and launch.rank == launch.local_rank
        self._alone = launch.kind == "none" or (launch.local_rank == 0 and not on_first_host)
        self._lock = TerminalLock()
        if self.is_sender:
            self.speaks()  # takes the terminal before any worker can

    def speaks(self) -> bool:
        """Whether this process shows the transfer on this terminal or in this log."""
        if self._quiet:
            return False
        if self._on_terminal:
            return self._lock.acquire()
        return self.is_sender or self._alone

    def listening(self, recv_line: str) -> None:
        self.is_sender = True
        # Also with --quiet: workers cannot join without it.
        self._print("run this on each worker:")
        self._print(f"\n    {recv_line}\n")

    def note(self, text: str) -> None:
        if self._shows_notes and self.speaks():
            self._print(text)

    def placed(self, rank: int, *, is_sender: bool) -> None:
        self.is_sender = is_sender
        if is_sender:
            self.speaks()

    def warn(self, text: str) -> None:
        if not self._quiet:
            self._print(f"packcast: warning: {text}")

    def started(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        self.start = start
        self.is_sender = start.is_sender
        self._spoke = self.speaks()
        if not self._spoke:
            return
        if start.loud:
            self.warn(f"no GPU is used: {start.reason}")
        if self._shows_notes:
            for line in start_lines(start, verbose=self.verbose):
                self._print(line)
        self._begin(start, progress)

    def ended(self, line: str) -> None:
        """Print the summary of a successful run; call it after `close`."""
        # Not `speaks()`: the sender may have released the terminal, but this rank stays silent.
        if self._spoke:
            self._print(line)
        self._lock.release()

    def close(self) -> None:
        self._finish()

    def _begin(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        """Start to show progress."""

    def _finish(self) -> None:
        """Stop showing progress."""

    def _print(self, text: str) -> None:
        say(text)


class SilentView(Display):
    """`--progress none`."""

    _shows_notes = False


class PlainView(Display):
    """Progress lines for a log file, each with the time of day."""

    def __init__(self, settings: Settings, launch: Launch, *, quiet: bool = False) -> None:
        super().__init__(settings, launch, quiet=quiet)
        self._stop = threading.Event()
        self._joining: JoiningLines | None = None

    def joining(self, joining: Joining) -> None:
        if not self.speaks():
            return
        now = time.monotonic()
        lines, is_first = self._joining, self._joining is None
        if lines is None:
            lines = self._joining = JoiningLines(joining, now)
        for line in lines.update(joining):
            self._print(line)
        if is_first:
            self._watch(lambda: lines.next_line(time.monotonic()), lambda: lines.is_over)

    def _begin(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        lines = PlainLines(time.monotonic(), start.hosts)
        self._watch(lambda: lines.next_line(progress(), time.monotonic()), lambda: False)

    def _watch(self, next_line: Callable[[], str | None], is_over: Callable[[], bool]) -> None:
        def watch() -> None:
            while not self._stop.wait(POLL_S) and not is_over():
                line = next_line()
                if line:
                    self._print(f"{time.strftime('%H:%M:%S')} {line}")

        threading.Thread(target=watch, name="packcast-progress", daemon=True).start()

    def phase(self, phase: Phase) -> None:
        if phase in ("publish", "done"):
            self._stop.set()

    def _finish(self) -> None:
        self._stop.set()


def make_view(
    mode: ProgressMode, settings: Settings, launch: Launch, *, quiet: bool = False
) -> Display:
    """The display that `--progress` asks for, on this terminal or file."""
    if quiet or mode == "none":
        return SilentView(settings, launch, quiet=quiet)
    if mode != "plain" and can_draw():  # bars need a terminal, whatever was asked for
        from packcast.cli.richview import RichView  # 60 ms that a log file does not need

        return RichView(settings, launch)
    return PlainView(settings, launch)


class JoiningLines:
    """Log lines while workers join: each of a few by name, of many a count every ten seconds."""

    def __init__(self, joining: Joining, now: float) -> None:
        self._joining = joining
        self._pace = Pace(now)

    @property
    def is_over(self) -> bool:
        """Whether all workers have joined."""
        return self._joining.joined >= self._joining.wanted

    def update(self, joining: Joining) -> list[str]:
        """Lines to print immediately."""
        self._joining = joining
        if joining.newest is None or joining.wanted > MAX_ROWS:
            return []
        return [f"{joining.newest} joined, {joining.joined} of {joining.wanted}"]

    def next_line(self, now: float) -> str | None:
        """The next line, or None if it is not due yet."""
        if self.is_over or not self._pace.is_due(now):
            return None
        return joining_line(self._joining, now)


class Pace:
    """The interval between lines: 10 s, and one minute after the first five minutes."""

    def __init__(self, now: float) -> None:
        self._began = self.said_at = now

    def is_due(self, now: float, *, earlier: bool = False) -> bool:
        """Whether a line is due; if so the interval starts again."""
        often = LINE_EVERY_S if now - self._began < OFTEN_FOR_S else LINE_EVERY_LATER_S
        due = now - self.said_at >= (LEAST_PAUSE_S if earlier else often)
        if due:
            self.said_at = now
        return due


class PlainLines:
    """When the next progress line is due, and its text; the caller passes the time."""

    def __init__(self, now: float, hosts: Mapping[int, str] | None = None) -> None:
        self._meter = Meter(now)
        self._hold_up = Bottleneck()
        self._hosts = hosts or {}
        self._pace = Pace(now)
        self._said_percent = 0

    def next_line(self, snapshot: Snapshot, now: float) -> str | None:
        """The next line, or None if it is not due yet."""
        rates = self._meter.rates(snapshot, now)
        self._hold_up.add(snapshot, now)
        done = percent(snapshot)
        moved = done - self._said_percent >= LINE_EVERY_PERCENT
        if not self._pace.is_due(now, earlier=moved):
            return None
        self._said_percent = done
        parts = [
            f"{done:3d} %",
            done_of(snapshot),
            format_speed(rates.whole),
            time_left(snapshot, rates),
            self._slowest(snapshot),
            self._hold_up.line(self._hosts, now),
        ]
        return "  ".join(part for part in parts if part)

    def _slowest(self, snapshot: Snapshot) -> str:
        rank = slowest_of(snapshot.workers)
        if rank is None or len(snapshot.workers) < 2:
            return ""
        host = f" ({self._hosts[rank]})" if rank in self._hosts else ""
        return f"slowest rank {rank}{host}"
