"""How a bench is watched and how it is told in the end: lines, or a table that grows.

Progress goes to standard error, the final table to standard output, exports to their files.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from packcast.bench.model import BenchView, Case, Environment, Limit, Measured
from packcast.bench.results import Results, case_label, facts, limit_label
from packcast.bench.rows import make_rows
from packcast.bench.targets import Target, write_targets
from packcast.cli.benchtable import (
    Line,
    all_lines,
    header_lines,
    limit_lines,
    row_lines,
    short_line,
)
from packcast.cli.options import ProgressMode
from packcast.cli.terminal import can_draw, printable, say
from packcast.errors import DestinationError, PackcastError
from packcast.units import format_duration, format_rate

REFRESH_PER_SECOND = 4


class BenchDisplay(BenchView):
    """Collects what comes and tells the end; in between it is silent (`--quiet`).

    `plot` draws what was found, at the end. Safe to end from another thread than the bench's.
    """

    def __init__(
        self,
        command_line: str,
        targets: tuple[Target, ...] = (),
        plot: Callable[[Results], None] | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self.results = Results(command_line=command_line)
        self._targets = targets
        self._plot = plot
        self._quiet = quiet
        self._measured: list[Measured] = []
        self._lock = threading.RLock()
        self._is_over = False
        self._is_sender = False
        self._said_unwritable = False

    def environment(self, environment: Environment, num_cases: int) -> None:
        self._is_sender = True
        self._update(replace(self.results, environment=environment, num_cases=num_cases))

    def limit(self, limit: Limit) -> None:
        self._update(replace(self.results, limits=(*self.results.limits, limit)))

    def measured(self, measured: Measured) -> None:
        with self._lock:
            self._measured.append(measured)
            self._update(replace(self.results, rows=make_rows(self._measured)))
            if self._is_over:
                return
            try:
                write_targets(self._targets, self.results)
            except DestinationError as error:  # the directory has gone: the end will say so again
                if not self._said_unwritable:
                    self.warn(error.message)
                self._said_unwritable = True

    def warn(self, text: str) -> None:
        self._update(replace(self.results, warnings=(*self.results.warnings, text)))
        if not self._quiet:
            self._print(f"packcast: warning: {text}")

    def end(self, error: PackcastError | None) -> None:
        """Tell everything that was found, once: exports, the table, the plot.

        Nothing on a rank that is not the sender. Raises DestinationError where an export fails.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self.close()
        if not self._is_sender:
            return
        code = error.exit_code if error else 0
        message = error.message if error else None
        self.results = replace(self.results, exit_code=code, error=message)
        self._tell()
        write_targets(self._targets, self.results)
        if self._plot and self.results.rows:
            self._plot(self.results)

    def _tell(self) -> None:
        """The table; on standard error where an export takes standard output."""
        to_stdout = all(target.path is not None for target in self._targets)
        if not to_stdout and self._quiet:
            return
        stream = sys.stdout if to_stdout else sys.stderr
        try:
            is_terminal = stream.isatty()
            console = _console(stderr=not to_stdout) if is_terminal else None
            for line in all_lines(self.results, console.width if console else None):
                if console:
                    console.print(styled(line), soft_wrap=True)
                else:
                    stream.write(line.text + "\n")
            stream.flush()
        except OSError:
            pass  # `packcast bench | head`: the exports still want to be written

    def _update(self, results: Results) -> None:
        with self._lock:
            self.results = results

    def _print(self, text: str) -> None:
        say(text)


class PlainBenchDisplay(BenchDisplay):
    """A line for each thing that becomes known, for a log file."""

    def environment(self, environment: Environment, num_cases: int) -> None:
        super().environment(environment, num_cases)
        for what, words in facts(environment):
            self._print(f"{what}: {words}")
        self._print(f"{num_cases} cases to measure")

    def limit(self, limit: Limit) -> None:
        super().limit(limit)
        detail = f" ({limit.detail})" if limit.detail else ""
        self._print(f"limit: {limit_label(limit)}: {format_rate(limit.bytes_per_second)}{detail}")

    def measured(self, measured: Measured) -> None:
        super().measured(measured)
        if self._is_over:  # a signal was faster
            return
        (row,) = make_rows([measured])
        place = f"[{len(self.results.rows)}/{self.results.num_cases}]"
        self._print(f"{place} {case_label(measured.case)}: {short_line(row)}")


class RichBenchDisplay(BenchDisplay):
    """The table as it grows, and what runs now; gone when the final one is printed."""

    def __init__(
        self,
        command_line: str,
        targets: tuple[Target, ...] = (),
        plot: Callable[[Results], None] | None = None,
    ) -> None:
        super().__init__(command_line, targets, plot)
        self._console = _console(stderr=True)
        self._live: Live | None = None
        self._now = "measuring the limits"
        self._runs_of: dict[Case, int] = {}
        self._done = self._runs_each = 0
        self._began = time.monotonic()

    def environment(self, environment: Environment, num_cases: int) -> None:
        super().environment(environment, num_cases)
        self._live = Live(
            console=self._console,
            get_renderable=self._frame,
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._live.start()

    def begun(self, case: Case, run: int, runs: int) -> None:
        self._runs_each = runs
        self._count(case, run)
        self._now = f"{case_label(case)}, run {run + 1} of {runs}"

    def measured(self, measured: Measured) -> None:
        self._count(measured.case, self._runs_each)
        super().measured(measured)

    def _count(self, case: Case, runs_done: int) -> None:
        self._done += runs_done - self._runs_of.get(case, 0)
        self._runs_of[case] = runs_done

    def close(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def _frame(self) -> RenderableType:
        # Without our lock: rich holds its own here, and takes it when we print under ours.
        results, now, done = self.results, self._now, self._done
        total = results.num_cases * self._runs_each
        width, height = self._console.size
        room = max(1, height - 4)
        lines = [*header_lines(results), *limit_lines(results), *row_lines(results, width)]
        if len(lines) > room:
            lines = row_lines(results, width)[-room:]
        shown: list[RenderableType] = [_one_line(line) for line in lines]
        status = Table.grid(expand=True, padding=(0, 1, 0, 0))
        status.add_column(no_wrap=True, overflow="ellipsis", ratio=3)
        status.add_column(ratio=1, min_width=8)
        status.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=max(total, 1), completed=done)
        spent = format_duration(time.monotonic() - self._began)
        status.add_row(printable(now), bar, f"{done}/{total} runs, {spent}")
        return Group(*shown, Text(), status)

    def _print(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)


def styled(line: Line) -> Text:
    """The line with its styles."""
    return Text.assemble(*((text, style) for text, style in line.spans if text))


def _one_line(line: Line) -> Text:
    text = styled(line)
    text.no_wrap, text.overflow = True, "crop"
    return text


def _console(*, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def make_bench_display(
    mode: ProgressMode,
    command_line: str,
    targets: tuple[Target, ...],
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
