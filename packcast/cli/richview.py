"""Progress bars on a terminal: total, workers, stages and bottleneck. Reads snapshots; no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from packcast.cli.bottleneck import RECEIVING, Bottleneck, chosen_workers, is_done, joining_line
from packcast.cli.progress import Display
from packcast.cli.rate import Meter, Rates, stages_line, time_left
from packcast.cli.terminal import printable
from packcast.launch.launchers import Launch
from packcast.settings import Settings
from packcast.units import format_size, format_speed
from packcast.view import Joining, Phase, Snapshot, Start

# A frame takes 3 to 9 ms of CPU, during which the interpreter is held.
REFRESH_PER_SECOND = 2
WIDE, MEDIUM = 76, 52  # minimum columns to show states, and sizes
_STATE_WIDTH = 12
_BESIDE_LABEL = 4 + 8 + 9 + _STATE_WIDTH + 5 + 10  # the other columns, spaces, a short bar
_LEAST_HOST = 8
_VERBS: dict[Phase, str] = {
    "load": "starting: importing torch",
    "join": "joining",
    "offer": "preparing",
    "finish": "finishing",
    "publish": "publishing",
    "done": "done",
}


class RichView(Display):
    """A live display on standard error; it never writes to standard output."""

    def __init__(self, settings: Settings, launch: Launch) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._draw: Callable[[], RenderableType] = Text
        self._verb = ""
        self._launch = launch
        super().__init__(settings, launch)

    def joining(self, joining: Joining) -> None:
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
            hold_up.add(snapshot, now)
            rates = meter.rates(snapshot, now)
            width = self._console.width
            return frame(self._verb, snapshot, rates, hold_up, now, width, hosts=start.hosts)

        self._show(draw)

    def _show(self, draw: Callable[[], RenderableType]) -> None:
        """From now on draw this, as the one live display: a new one would begin with a blank."""
        self._draw = draw
        if self._live is not None:
            return
        # Transient: only the summary or the error stays on the screen.
        self._live = Live(
            console=self._console,
            get_renderable=lambda: self._draw(),
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,
            transient=True,
        )
        self._live.start(refresh=True)

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
    hold_up: Bottleneck,
    now: float,
    width: int,
    *,
    hosts: Mapping[int, str],
) -> RenderableType:
    """The whole display as one renderable."""
    total = snapshot.nbytes_total
    rows = chosen_workers(snapshot.workers)
    bars = Table.grid(expand=True, padding=(0, 1, 0, 0))
    bars.add_column(min_width=10, no_wrap=True)
    bars.add_column(ratio=1)
    for _ in range(2 + (width >= MEDIUM) + (width >= WIDE)):
        bars.add_column(no_wrap=True)

    def add(label: str, nbytes: int, rate: float | None, state: str, of_total: str = "") -> None:
        share = f"{100 * nbytes // total if total else 100}%"
        # Fixed widths keep the bar's length constant.
        cells = [share.rjust(4), "" if rate is None else format_speed(rate).rjust(9)]
        if width >= MEDIUM:
            cells.insert(1, format_size(nbytes).rjust(8) + of_total)
        if width >= WIDE:
            cells.append(state.ljust(_STATE_WIDTH))
        bars.add_row(label, _bar(nbytes, total), *cells)

    of_total = f" of {format_size(total)}"
    left = time_left(snapshot, rates)
    add(verb, snapshot.nbytes_done, rates.whole, left, of_total)
    digits = len(str(max(snapshot.workers, default=0)))
    labels = [f"  {kind.ljust(8) if kind else ''}rank {rank:{digits}}" for kind, rank in rows]
    if width >= WIDE:
        room = width - _BESIDE_LABEL - len(of_total) - max(map(len, labels), default=0)
        labels = [
            label + _short(hosts.get(rank, ""), room)
            for label, (_, rank) in zip(labels, rows, strict=True)
        ]
    for label, (_, rank) in zip(labels, rows, strict=True):
        rate, state = rates.workers.get(rank, 0.0), hold_up.state(rank)
        if state == RECEIVING and not rate:
            state = "waiting"
        add(label, snapshot.workers[rank].nbytes, None if state == "done" else rate, state)
    lines: list[RenderableType] = [bars]
    if len(rows) < len(snapshot.workers):
        done = sum(is_done(worker, total) for worker in snapshot.workers.values())
        lines.append(_dim(f"  {len(snapshot.workers)} workers, {done} done"))
    if rates.stages:
        lines.append(_dim(f"  {stages_line(rates.stages)}"))
    waiting = hold_up.line(hosts, now)
    if waiting:
        lines.append(Text(f"  {printable(waiting)}", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def _short(host: str, room: int) -> str:
    """The host name after a label: without its domain, and cut at the front if it is too long."""
    name = printable(host)
    if not name[:1].isdigit():  # may be an IP address
        name = name.partition(".")[0]
    if len(name) < room:
        return f" {name}" if name else ""
    return f" ~{name[2 - room :]}" if room >= _LEAST_HOST else ""


def _dim(text: str) -> Text:
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _bar(nbytes: int, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=nbytes if total else 1)
