"""Bars on a terminal: the whole in bytes, the stages in one line, the workers where they are few.

Reads snapshots four times a second; knows nothing of torch or of how bytes move.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from packcast.cli.progress import Display
from packcast.cli.rate import RateWindow, done_of, percent, stages_line, time_left, workers_line
from packcast.cli.terminal import printable
from packcast.group.launch import Launch
from packcast.settings import Settings
from packcast.units import format_rate
from packcast.view import Phase, Snapshot, Start

MAX_WORKER_BARS = 8
REFRESH_PER_SECOND = 4
WIDE, MEDIUM = 76, 52  # columns from which the time left, and the sizes, have room beside a bar
_VERBS: dict[Phase, str] = {"finish": "finishing", "publish": "publishing", "done": "done"}


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second right now: of the whole and of each stage."""

    whole: float
    stages: dict[str, float]


class RichView(Display):
    """A live display on standard error; standard output is left alone."""

    def __init__(self, settings: Settings, launch: Launch) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._verb = ""
        super().__init__(settings, launch)

    def _begin(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        self._verb = "sending" if start.is_sender else "receiving"
        meter = Meter(time.monotonic())

        def draw() -> RenderableType:
            snapshot = progress()
            rates = meter.rates(snapshot, time.monotonic())
            return frame(self._verb, snapshot, rates, self._console.width)

        # Transient: what stays on the screen is the end line, or the error.
        self._live = Live(
            console=self._console,
            get_renderable=draw,
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,
            transient=True,
        )
        self._live.start()

    def phase(self, phase: Phase) -> None:
        self._verb = _VERBS.get(phase, self._verb)

    def _finish(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def _print(self, text: str) -> None:
        # Above the bars; unwrapped, so that a command line can be copied.
        self._console.print(Text(printable(text)), soft_wrap=True)


class Meter:
    """Windows for the whole and for each stage that shows up."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._windows: dict[str, RateWindow] = {}

    def rates(self, snapshot: Snapshot, now: float) -> Rates:
        """Take one sample of everything."""

        def rate(name: str, nbytes: int) -> float:
            return self._windows.setdefault(name, RateWindow(self._began)).add(now, nbytes)

        stages = {stage: rate(stage, nbytes) for stage, nbytes in snapshot.stages.items()}
        return Rates(rate("", snapshot.nbytes_done), stages)


def frame(verb: str, snapshot: Snapshot, rates: Rates, width: int) -> RenderableType:
    """Everything that is on the screen at one moment."""
    total = snapshot.nbytes_total
    few = 0 < len(snapshot.workers) <= MAX_WORKER_BARS
    lines: list[RenderableType] = []
    if rates.stages:
        stages = stages_line(rates.stages)
        at = f"  {printable(snapshot.at)}" if snapshot.at else ""
        lines.append(Text(f"  {stages}{at}", style="dim", no_wrap=True, overflow="ellipsis"))
    if snapshot.workers and not few:
        line = f"  {workers_line(snapshot.workers, total)}"
        lines.append(Text(line, style="dim", no_wrap=True, overflow="ellipsis"))
    bars = Table.grid(expand=True, padding=(0, 1, 0, 0))
    bars.add_column(min_width=10, no_wrap=True)
    bars.add_column(ratio=1)
    bars.add_column(justify="right", no_wrap=True)
    details = [format_rate(rates.whole).rjust(9)]
    if width >= MEDIUM:
        details.insert(0, done_of(snapshot))
    if width >= WIDE:
        # Of a fixed width, so that the bar does not change its length with every second.
        details.append(time_left(snapshot, rates.whole).rjust(16))
    for _ in details:
        bars.add_column(justify="right", no_wrap=True)
    bars.add_row(verb, _bar(snapshot.nbytes_done, total), f"{percent(snapshot)}%", *details)
    for rank, nbytes in sorted(snapshot.workers.items()) if few else ():
        share = f"{100 * nbytes // total if total else 100}%"
        bars.add_row(f"  rank {rank}", _bar(nbytes, total), share)
    return Group(bars, *lines)


def _bar(nbytes: int, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=nbytes if total else 1)
