"""How a bench is watched and how it is told in the end: lines, or a table that grows.

Progress goes to standard error, the final table to standard output, exports to their files.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from packcast.bench.export_files import ExportFile, write_exports
from packcast.bench.model import BenchView, Results, Row
from packcast.bench.stats import limit_of, rate_of, waiting_on, wrong_of
from packcast.bench.table import (
    LIMIT_TITLES,
    ROW_TITLES,
    closing_lines,
    environment_lines,
    limit_cells,
    row_cells,
    without_empty,
)
from packcast.cli.options import ProgressMode
from packcast.cli.terminal import can_draw, printable, say
from packcast.errors import DestinationError, PackcastError
from packcast.units import format_duration, format_rate

_REFRESH_PER_SECOND = 4
_LEAST_SHARE = 0.05  # of the sweep, before anybody guesses how long the rest takes
_WIDTH_OF_FILES = 240  # where the table goes to no terminal: nothing is cut off or wrapped


class BenchDisplay(BenchView):
    """Collects what comes and tells the end; in between it is silent (`--quiet`).

    `plot` draws what was found, at the end. Safe to end from another thread than the bench's.
    """

    def __init__(
        self,
        command_line: str,
        targets: Sequence[ExportFile] = (),
        plot: Callable[[Results], None] | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self.results = Results(command_line=command_line)
        self._targets = targets
        self._plot = plot
        self._quiet = quiet
        self._lock = threading.RLock()
        self._is_over = False
        self._said_unwritable = False
        self._num_told = 0  # warnings

    def found(self, results: Results, news: Row | None = None) -> None:
        with self._lock:
            if self._is_over:
                return
            first = self.results.environment is None and results.environment is not None
            self.results = replace(results, command_line=self.results.command_line)
            if first:
                self._begin()
            for text in results.warnings[self._num_told :]:
                self._say(f"packcast: warning: {text}")
            self._num_told = len(results.warnings)
            if news is not None:
                self._tell_news(news)
                self._export()

    def end(self, error: PackcastError | None) -> None:
        """Tell everything that was found, once: exports, the table, the plot.

        Nothing on a rank that is not the sender. Raises DestinationError where an export fails.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._close()
        if self.results.environment is None:
            return
        code, message = (error.exit_code, error.message) if error else (0, None)
        self.results = replace(self.results, exit_code=code, error=message)
        self._tell_all()
        write_exports(self._targets, self.results)
        if self._plot and self.results.rows:
            self._plot(self.results)

    def _begin(self) -> None:
        """The environment is known."""

    def _tell_news(self, news: Row) -> None:
        """A row is known."""

    def _close(self) -> None:
        """Nothing more will come; restore the terminal."""

    def _say(self, text: str) -> None:
        if not self._quiet:
            say(text)

    def _export(self) -> None:
        try:
            write_exports(self._targets, self.results)
        except DestinationError as error:  # the directory has gone: the end will say so again
            if not self._said_unwritable:
                self._say(f"packcast: warning: {error.message}")
            self._said_unwritable = True

    def _tell_all(self) -> None:
        """The table; on standard error where an export takes standard output."""
        to_stdout = all(target.path is not None for target in self._targets)
        if not to_stdout and self._quiet:
            return
        try:
            console = _console(stderr=not to_stdout)
            for part in all_parts(self.results):
                console.print(part)
        except OSError:
            pass  # `packcast bench | head`: the exports still want to be written


class PlainBenchDisplay(BenchDisplay):
    """A line for each thing that becomes known, for a log file."""

    def _begin(self) -> None:
        assert self.results.environment is not None, "it is known"
        for what, words in environment_lines(self.results.environment):
            self._say(f"{what}: {words}")
        self._say(f"{self.results.num_cases} cases to measure")

    def _tell_news(self, news: Row) -> None:
        done = sum(row.is_complete for row in self.results.rows)
        self._say(f"[{done}/{self.results.num_cases}] {news.case}: {_in_short(news)}")


class RichBenchDisplay(BenchDisplay):
    """The table as it grows, and what runs now; gone when the final one is printed."""

    _live: Live | None = None
    _now, _share = "measuring the limits", 0.0

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._live = Live(
            console=_console(stderr=True),
            get_renderable=self._frame,
            refresh_per_second=_REFRESH_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._live.start()

    def doing(self, text: str, share_done: float) -> None:
        self._now, self._share = text, share_done

    def _close(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def _frame(self) -> RenderableType:
        # Without our lock: rich holds its own here, and takes it when we print under ours.
        spent = time.monotonic() - self._began
        status = f"{printable(self._now)} ({self._share:.0%} of the runs, {format_duration(spent)}"
        if self._share > _LEAST_SHARE:
            left = spent / self._share * (1 - self._share)
            status += f", about {format_duration(left)} left"
        table = _table(ROW_TITLES, row_cells(self.results.rows))
        line = Text(status + ")", no_wrap=True)
        return Group(table, Text(), line) if table else line

    def _say(self, text: str) -> None:
        if self._live:
            self._live.console.print(Text(printable(text)))
        else:
            super()._say(text)


def all_parts(results: Results) -> list[RenderableType]:
    """Everything, from the command line to the warnings."""
    parts: list[RenderableType] = [Text(printable(results.command_line), style="bold")]
    if results.environment:
        lines = environment_lines(results.environment)
        parts += [Text(f"{what:<9} {printable(words)}", style="dim") for what, words in lines]
    for titles, cells in (
        (LIMIT_TITLES, limit_cells(results)),
        (ROW_TITLES, row_cells(results.rows)),
    ):
        if table := _table(titles, cells):
            parts += ["", table]
    return [*parts, "", *(Text(printable(line)) for line in closing_lines(results))]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table | None:
    """A title that begins with `>` aligns to the right; the marked rows are bold."""
    if not rows:
        return None
    kept, cells = without_empty(titles, rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in kept:
        right = title.startswith(">")
        text = title.removeprefix(">")
        table.add_column(text, justify="right" if right else "left", no_wrap=text != "how")
    for row in cells:
        style = "bold" if row[0] in ("*", "~") else ""
        table.add_row(*(Text(printable(cell)) for cell in row), style=style)
    return table


def _in_short(row: Row) -> str:
    rate = rate_of(row)
    if limit := limit_of(row):
        return f"{format_rate(limit.bytes_per_second)} at best"
    if rate is None:
        return f"left out: {row.failure}"
    words = [format_rate(rate)]
    if waiting := waiting_on(row):
        words.append(f"waiting on {waiting}")
    if wrong := wrong_of(row):
        words.append(f"{wrong} WRONG")
    return ", ".join(words)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDTH_OF_FILES
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def make_bench_display(
    mode: ProgressMode,
    command_line: str,
    targets: Sequence[ExportFile],
    plot: Callable[[Results], None] | None,
    *,
    quiet: bool,
) -> BenchDisplay:
    """The display that `--progress` asks for, on this terminal or file."""
    if quiet or mode == "none":
        return BenchDisplay(command_line, targets, plot, quiet=quiet)
    if mode != "plain" and can_draw():
        return RichBenchDisplay(command_line, targets, plot)
    return PlainBenchDisplay(command_line, targets, plot)
