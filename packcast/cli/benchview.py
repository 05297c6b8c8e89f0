"""The display of a bench: progress on standard error, the tables on standard output.

Writes the exports and the plot too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from packcast.bench import table
from packcast.bench.export import Exports, write_exports
from packcast.bench.model import BenchView, Results, Row
from packcast.bench.stats import limit_of, waiting_on
from packcast.cli.options import ProgressMode
from packcast.cli.terminal import can_draw, printable, say
from packcast.errors import DestinationError, PackcastError
from packcast.units import format_duration, format_rate

Mode = Literal["quiet", "none", "plain", "rich"]

_REFRESH_PER_SECOND = 4
_LEAST_SHARE = 0.05  # of the sweep, before the remaining time is estimated
_GAP = 3  # between columns
_WIDTH_OF_FILES = 240  # where the table goes to no terminal: nothing is cut off or wrapped


class BenchDisplay(BenchView):
    """Shows the results as they come, as `mode` says, and all of them at the end.

    "quiet" shows nothing but the table at the end; "none" warnings too; "plain" a line for each
    row; "rich" the growing table. May be ended by another thread than the bench's.
    """

    def __init__(
        self,
        mode: Mode,
        command_line: str,
        exports: Exports,
        plot: Callable[[Results], None] | None = None,
    ) -> None:
        self.results = Results(command_line=command_line)
        self._mode = mode
        self._exports = exports
        self._plot = plot
        self._lock = threading.RLock()
        self._is_over = False
        self._has_warned_of_exports = False
        self._num_warnings = 0
        self._live: Live | None = None
        self._began = time.monotonic()
        self._doing, self._share = "measuring the limits", 0.0

    def doing(self, text: str, share_done: float) -> None:
        self._doing, self._share = text, share_done

    def found(self, results: Results, news: Row | None = None) -> None:
        with self._lock:
            if self._is_over:
                return
            is_first = self.results.environment is None and results.environment is not None
            self.results = replace(results, command_line=self.results.command_line)
            if is_first:
                self._begin()
            for text in results.warnings[self._num_warnings :]:
                self._warn(text)
            self._num_warnings = len(results.warnings)
            if news is None:
                return
            if self._mode == "plain":
                done = sum(row.is_complete for row in results.rows)
                say(f"[{done}/{results.num_cases}] {news.case}: {_in_short(news)}")
            try:
                write_exports(self._exports, self.results)
            except DestinationError as error:  # its directory is gone: `end` fails too
                if not self._has_warned_of_exports:
                    self._warn(error.message)
                self._has_warned_of_exports = True

    def end(self, error: PackcastError | None) -> None:
        """Show all results, once: the table, the exports, the plot.

        Does nothing on a rank that is not the sender. Raises DestinationError where an export
        fails.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        if self._live:
            self._live.stop()
        if self.results.environment is None:
            return
        code, message = (error.exit_code, error.message) if error else (0, None)
        self.results = replace(self.results, exit_code=code, error=message)
        with suppress(OSError):  # `packcast bench | head`: the exports are written all the same
            self._print_results()
        write_exports(self._exports, self.results)
        if self._plot and self.results.rows:
            self._plot(self.results)

    def _begin(self) -> None:
        """The environment is known."""
        if self._mode == "plain":
            assert self.results.environment is not None
            for what, text in table.environment_lines(self.results.environment):
                say(f"{what}: {text}")
            say(f"{self.results.num_cases} cases to measure")
        elif self._mode == "rich":
            self._began = time.monotonic()
            self._live = Live(
                console=_console(stderr=True),
                get_renderable=self.frame,
                refresh_per_second=_REFRESH_PER_SECOND,
                redirect_stdout=False,
                redirect_stderr=False,
                transient=True,
            )
            self._live.start()

    def _warn(self, text: str) -> None:
        text = f"packcast: warning: {text}"
        if self._live:
            self._live.console.print(Text(printable(text)))
        elif self._mode != "quiet":
            say(text)

    def frame(self) -> RenderableType:
        """The table so far and the status line.

        Does not take our lock: rich holds its own here, and takes it when we print under ours.
        """
        spent = time.monotonic() - self._began
        status = f"{printable(self._doing)} ({self._share:.0%} of the runs, "
        status += format_duration(spent)
        if self._share > _LEAST_SHARE:
            left = spent / self._share * (1 - self._share)
            status += f", about {format_duration(left)} left"
        line = Text(status + ")", no_wrap=True)
        rows = [one for one in table.tables(self.results) if "method" in one[0]]
        return Group(*map(_Drawn, rows), Text(), line) if rows else line

    def _print_results(self) -> None:
        """On standard error where an export takes standard output."""
        to_stderr = None in self._exports.values()
        if to_stderr and self._mode == "quiet":
            return
        console = _console(stderr=to_stderr)
        console.print(Text(printable(self.results.command_line), style="bold"))
        if self.results.environment:
            for what, text in table.environment_lines(self.results.environment):
                console.print(Text(f"{what:<9} {printable(text)}", style="dim"))
        for one in table.tables(self.results):
            console.print()
            console.print(_Drawn(one))
        console.print()
        for line in table.closing_lines(self.results):
            console.print(Text(printable(line)))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A table as wide as the terminal allows, and the columns that it has no room for.

    rich would squeeze all columns that must not wrap, short ones to nothing.
    """

    content: table.Table

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        (titles, rows), left_out = table.fitting(self.content, options.max_width, gap=_GAP)
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for title in titles:
            text = title.removeprefix(">")
            drawn.add_column(
                text,
                justify="left" if text == title else "right",
                no_wrap=title not in table.WRAPPED,
            )
        for row in rows:
            style = "bold" if row[0] in ("*", "~") else ""  # the marked ones
            drawn.add_row(*(Text(printable(cell)) for cell in row), style=style)
        yield drawn
        if left_out:
            yield Text(f"no room for {', '.join(left_out)}: --export-csv has them")


def _in_short(row: Row) -> str:
    if limit := limit_of(row):
        return f"{format_rate(limit.bytes_per_second)} at best"
    if row.rate is None:
        return f"left out: {row.failure}"
    words = [format_rate(row.rate)]
    if waiting := waiting_on(row):
        words.append(f"waiting on {waiting[0]}")
    if row.wrong:
        words.append(f"{row.wrong} WRONG")
    return ", ".join(words)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDTH_OF_FILES
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def make_bench_display(
    progress: ProgressMode,
    command_line: str,
    exports: Exports,
    plot: Callable[[Results], None] | None,
    *,
    quiet: bool,
) -> BenchDisplay:
    """The display that `--progress` and `--quiet` ask for, on this terminal or file."""
    mode: Mode = "rich" if can_draw() else "plain"
    if quiet:
        mode = "quiet"
    elif progress == "none" or progress == "plain":
        mode = progress
    return BenchDisplay(mode, command_line, exports, plot)
