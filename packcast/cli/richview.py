"""Bars on a terminal: the whole, the workers, the stages, and what the transfer waits on.

Reads snapshots four times a second; knows nothing of torch or of how bytes move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from packcast.cli.bottleneck import Bottleneck, chosen_workers, culprit_of, joining_line, state_of
from packcast.cli.progress import Display
from packcast.cli.rate import Meter, Rates, done_of, stages_line, time_left
from packcast.cli.terminal import printable
from packcast.launch.launchers import Launch
from packcast.settings import Settings
from packcast.units import format_size, format_speed
from packcast.view import Joining, Phase, Snapshot, Start

REFRESH_PER_SECOND = 4
WIDE, MEDIUM = 76, 52  # columns from which states, and sizes, have room beside a bar
_MAX_HOST = 16
_VERBS: dict[Phase, str] = {
    "load": "starting",
    "join": "joining",
    "offer": "preparing",
    "finish": "finishing",
    "publish": "publishing",
    "done": "done",
}


class RichView(Display):
    """A live display on standard error; standard output is left alone."""

    def __init__(self, settings: Settings, launch: Launch) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._verb = ""
        self._launch = launch
        super().__init__(settings, launch)

    def joining(self, joining: Joining) -> None:
        super().joining(joining)
        if self.speaks():
            self._show(lambda: _dim(f"  {joining_line(joining, time.monotonic())}"))

    def phase(self, phase: Phase) -> None:
        self._verb = _VERBS.get(phase, self._verb)
        # A worker of one launch would take the terminal from the sender.
        is_first = self.is_sender or self._launch.kind == "none"
        if phase == "load" and is_first and self.speaks():
            began = time.monotonic()
            self._show(lambda: _dim(f"  {self._verb} ({time.monotonic() - began:.0f} s)"))

    def _begin(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        self._verb = "sending" if start.is_sender else "receiving"
        meter, hold_up = Meter(time.monotonic()), Bottleneck()

        def draw() -> RenderableType:
            snapshot, now = progress(), time.monotonic()
            rates = meter.rates(snapshot, now)
            hold_up.add(culprit_of(snapshot), now)
            waiting = hold_up.line(start.hosts, now)
            return frame(
                self._verb, snapshot, rates, self._console.width, hosts=start.hosts, waiting=waiting
            )

        self._show(draw)

    def _show(self, draw: Callable[[], RenderableType]) -> None:
        """Draw this from now on, in the place of what was drawn before."""
        self._finish()
        # Transient: what stays on the screen is the end line, or the error.
        self._live = Live(
            console=self._console,
            get_renderable=draw,
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,
            transient=True,
        )
        self._live.start()

    def _finish(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def _print(self, text: str) -> None:
        # Above the bars; unwrapped, so that a command line can be copied.
        self._console.print(Text(printable(text)), soft_wrap=True)


def frame(
    verb: str,
    snapshot: Snapshot,
    rates: Rates,
    width: int,
    *,
    hosts: Mapping[int, str] | None = None,
    waiting: str | None = None,
) -> RenderableType:
    """Everything that is on the screen at one moment."""
    total = snapshot.nbytes_total
    rows = chosen_workers(snapshot.workers)
    bars = Table.grid(expand=True, padding=(0, 1, 0, 0))
    bars.add_column(min_width=10, no_wrap=True)
    bars.add_column(ratio=1)
    for right in (True, True, True, False)[: 2 + (width >= MEDIUM) + (width >= WIDE)]:
        bars.add_column(justify="right" if right else "left", no_wrap=True)

    def add(label: str, nbytes: int, sizes: str, rate: float, state: str) -> None:
        share = f"{100 * nbytes // total if total else 100}%"
        # Of a fixed width, so that the bar does not change its length with every second.
        cells = [share, format_speed(rate).rjust(9)]
        if width >= MEDIUM:
            cells.insert(1, sizes)
        if width >= WIDE:
            cells.append(state.ljust(12))
        bars.add_row(label, _bar(nbytes, total), *cells)

    left = time_left(snapshot, rates.lasting)
    add(verb, snapshot.nbytes_done, done_of(snapshot), rates.whole, left)
    for kind, rank in rows:
        worker = snapshot.workers[rank]
        label = f"  {kind} rank {rank}" if kind else f"  rank {rank}"
        if width >= WIDE and hosts and rank in hosts:
            label += f" {printable(hosts[rank])[:_MAX_HOST]}"
        size = format_size(worker.nbytes)
        add(label, worker.nbytes, size, rates.workers.get(rank, 0.0), state_of(worker, total))
    lines: list[RenderableType] = [bars]
    if len(rows) < len(snapshot.workers):
        done = sum(state_of(it, total) == "done" for it in snapshot.workers.values())
        lines.append(_dim(f"  {len(snapshot.workers)} workers, {done} done"))
    if rates.stages:
        at = f"  {printable(snapshot.at)}" if snapshot.at else ""
        lines.append(_dim(f"  {stages_line(rates.stages)}{at}"))
    if waiting:
        lines.append(Text(f"  {printable(waiting)}", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def _dim(text: str) -> Text:
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _bar(nbytes: int, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=nbytes if total else 1)
