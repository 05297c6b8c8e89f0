"""What a person sees of a transfer: lines, or (cli/richview.py) bars. One renderer per terminal.

Reads snapshots only; knows nothing of torch or of how bytes move.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from packcast.cli.options import ProgressMode
from packcast.cli.rate import RateWindow, done_of, percent, start_lines, time_left
from packcast.cli.terminal import TerminalLock, can_draw, say
from packcast.group.launch import Launch
from packcast.settings import Settings
from packcast.units import format_rate
from packcast.view import Phase, Snapshot, Start, View

POLL_S = 0.25
LINE_EVERY_S = 5.0
LINE_EVERY_PERCENT = 10
LINE_AT_LEAST_EVERY_S = 60.0


class Display(View):
    """Who may speak here, and the lines that are no progress. By itself: `--progress none`.

    Errors are not its business: they are printed by whoever ends the run, after `close`.
    """

    def __init__(self, settings: Settings, launch: Launch, *, quiet: bool = False) -> None:
        self.start: Start | None = None
        self.verbose = False
        self._spoke = False
        # A guess until the transfer says so: where a lower rank ran `recv`, another rank sends.
        self.is_sender = settings.command == "send" and launch.rank == 0
        self._quiet = quiet
        self._on_terminal = can_draw()
        # Into a file, the ranks of one launch write the same lines: one of them is enough.
        self._alone = settings.command == "recv" and (
            launch.kind == "none" or launch.local_rank == 0
        )
        self._lock = TerminalLock()
        if self.is_sender:
            self.speaks()  # before any worker may ask for the terminal

    def speaks(self) -> bool:
        """Whether this process is the one that shows the transfer here."""
        if self._quiet:
            return False
        if self._on_terminal:
            return self._lock.acquire()
        return self.is_sender or self._alone

    def listening(self, recv_line: str) -> None:
        self.is_sender = True
        # Also with --quiet: nobody can join who has not seen it.
        self._print("run this on each worker:")
        self._print(f"\n    {recv_line}\n")

    def joined(self, label: str, joined: int, wanted: int) -> None:
        self.is_sender = True
        if self.speaks():
            self._print(f"{label} joined, {joined} of {wanted}")

    def note(self, text: str) -> None:
        if self.speaks():
            self._print(text)

    def placed(self, rank: int, *, is_sender: bool) -> None:
        self.is_sender = is_sender

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
        for line in start_lines(start, verbose=self.verbose):
            self._print(line)
        self._begin(start, progress)

    def ended(self, line: str) -> None:
        """The last line of a run that went well; after `close`."""
        # Not `speaks`: a silent rank must not find its voice because the renderer has just gone.
        if self._spoke:
            self._print(line)
        self._lock.release()

    def close(self) -> None:
        self._finish()

    def _begin(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        """Show progress from now on."""

    def _finish(self) -> None:
        """Show no more."""

    def _print(self, text: str) -> None:
        say(text)


class PlainView(Display):
    """Lines for a log file: at most one per 10 % and per 5 s, at least one per minute."""

    def __init__(self, settings: Settings, launch: Launch, *, quiet: bool = False) -> None:
        super().__init__(settings, launch, quiet=quiet)
        self._stop = threading.Event()

    def _begin(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        lines = PlainLines(time.monotonic())

        def watch() -> None:
            while not self._stop.wait(POLL_S):
                line = lines.next_line(progress(), time.monotonic())
                if line:
                    self._print(line)

        threading.Thread(target=watch, name="packcast-progress", daemon=True).start()

    def phase(self, phase: Phase) -> None:
        if phase not in ("join", "offer", "start", "data"):
            self._stop.set()

    def _finish(self) -> None:
        self._stop.set()


class PlainLines:
    """When the next line is due, and what it says; told the time, it has no clock."""

    def __init__(self, now: float) -> None:
        self._rate = RateWindow(now)
        self._said_at = now
        self._said_percent = 0

    def next_line(self, snapshot: Snapshot, now: float) -> str | None:
        """A line, or None while it is too early for one."""
        rate = self._rate.add(now, snapshot.nbytes_done)
        done = percent(snapshot)
        since = now - self._said_at
        moved = done - self._said_percent >= LINE_EVERY_PERCENT
        if since < LINE_EVERY_S or not (moved or since >= LINE_AT_LEAST_EVERY_S):
            return None
        self._said_at, self._said_percent = now, done
        parts = [f"{done:3d} %", done_of(snapshot), format_rate(rate), time_left(snapshot, rate)]
        return "  ".join(part for part in (*parts, snapshot.at) if part)


def make_view(
    mode: ProgressMode, settings: Settings, launch: Launch, *, quiet: bool = False
) -> Display:
    """The display that `--progress` asks for, on this terminal or file."""
    if quiet or mode == "none":
        return Display(settings, launch, quiet=quiet)
    if mode != "plain" and can_draw():  # bars need a terminal, whatever was asked for
        from packcast.cli.richview import RichView  # 60 ms that a log file does not need

        return RichView(settings, launch)
    return PlainView(settings, launch)
