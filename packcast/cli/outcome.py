"""The end of a command: error or summary, JSON result, exit code.

The one place that prints an error. Knows no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from packcast.cli.jsonlog import JsonLog
from packcast.cli.progress import Display
from packcast.cli.result import ending, report_document, to_json
from packcast.cli.summary import end_lines
from packcast.cli.terminal import say, say_once
from packcast.errors import (
    DestinationError,
    Interrupted,
    PackcastError,
    error_from_code,
    out_of_descriptors,
)
from packcast.launch.exit import record_failure, said_here
from packcast.launch.handover import received
from packcast.launch.launchers import ALONE, Launch
from packcast.report import Report
from packcast.settings import Settings, fill_in

_TRY_VERBOSE = "run again with -v for the traceback"


def command_failure(error: BaseException) -> PackcastError:
    """Any exception of a command, Ctrl-C too, as a PackcastError with an exit code.

    `errors.as_packcast_error` is the same for threads, which can say what they were doing.
    """
    if isinstance(error, PackcastError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted", signal_number=signal.SIGINT)
    if known := out_of_descriptors(error):
        return known
    wrapped = PackcastError(f"this is a bug: {type(error).__name__}: {error}", hint=_TRY_VERBOSE)
    wrapped.__cause__ = error
    return wrapped


@dataclass(slots=True)
class Outcome:
    """What the end of the running command needs to know."""

    argv: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    command: str = ""
    verbose: bool = False
    json: str | None = None
    settings: Settings | None = None
    launch: Launch = ALONE
    display: Display | None = None
    log: JsonLog | None = None
    before_error: Callable[[PackcastError], None] | None = None  # a bench's rows so far

    def failed(self, error: PackcastError) -> None:
        """Print the error and write the result; also on a thread other than the main one."""
        if self.display:
            self.display.close()
        if self.log:
            self.log.ended(error)
        second: PackcastError | None = None
        if self.before_error:
            try:
                self.before_error(error)
            except PackcastError as unwritable:
                second = unwritable
        if self.verbose:
            say("".join(traceback.format_exception(error)).rstrip())
        self._say_error(error)
        try:
            self._write_failure(error)
        except PackcastError as unwritable:
            second = unwritable
        if second:
            self._say_error(second)

    def finished(self, report: Report) -> int:
        """Print and write the result, which may be a failure; returns the exit code."""
        report = replace(report, total_seconds=time.monotonic() - self.began)
        if self.display:
            self.display.close()
            if report.ok:
                self.display.ended("\n".join(end_lines(report)))
        error: PackcastError | None = None
        if not report.ok:
            error = error_from_code(report.exit_code, report.error or "failed", report.hint)
        if self.log:
            self.log.ended(error)
        if error is not None:
            record_failure(error)
            # With --nproc the sender prints each worker's failure on the same terminal.
            if report.is_sender or self.verbose or received() is None:
                self._say_error(error)
        self._write_report(report)
        return report.exit_code

    def write_document(self, document: dict[str, object], rank: int | None = None) -> None:
        """Write the JSON result to the file of --json, if given."""
        if self.json is None:
            return
        text = to_json(document)
        if self.json == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        from packcast.launch.devices import host_name

        local_rank, host = self.launch.local_rank, host_name()
        path = Path(fill_in(self.json, rank=rank or 0, local_rank=local_rank, host=host))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DestinationError(f"--json: {path}: {error.strerror}") from error

    def _say_error(self, error: PackcastError) -> None:
        tried = self.verbose and error.hint == _TRY_VERBOSE
        hint = f"\n  {error.hint}" if error.hint and not tried else ""
        text = f"packcast: error: {error.message}{hint}"
        # A rank with an explicit address belongs to no launch, whatever the environment says.
        by_address = self.settings is not None and self.settings.by_address
        said = None if by_address else said_here()
        if said is None or self.verbose:  # then each rank's follows its traceback
            say(text)
        elif received() is None or not isinstance(
            error, Interrupted
        ):  # --nproc reports the interruption
            say_once(text, said)

    def _write_report(self, report: Report) -> None:
        # A file without {rank} in its name is the sender's, or belongs to a lone `recv`.
        lone_recv = report.command == "recv" and self.launch.kind == "none"
        if report.is_sender or lone_recv or (self.json and "{rank}" in self.json):
            started = datetime.fromtimestamp(self.started_at, UTC).isoformat(timespec="seconds")
            document = report_document(replace(report, started=started))
            self.write_document(document, report.rank)

    def _write_failure(self, error: PackcastError) -> None:
        if self.settings:
            self._write_report(failure_report(self.settings, self.launch, self.display, error))
        elif self.launch.rank == 0 or (self.json and "{rank}" in self.json):
            self.write_document(ending(self.command, error), self.launch.rank)


def failure_report(
    settings: Settings, launch: Launch, display: Display | None, error: PackcastError
) -> Report:
    """The result of a run that ended in `error`, with what the display knows of it."""
    report = Report(
        command=settings.command,
        checkpoint=None if settings.checkpoint is None else os.path.abspath(settings.checkpoint),
        is_sender=display.is_sender if display else settings.command == "send",
        rank=settings.rank if launch.kind == "none" else launch.rank,
        ok=False,
        exit_code=error.exit_code,
        error=error.message,
        hint=error.hint,
    )
    start = display.start if display else None
    if start is None:
        return report
    return replace(
        report,
        rank=start.rank,
        num_files=start.num_files,
        num_tensors=start.num_tensors,
        nbytes=start.nbytes,
        backend=start.backend,
        reason=start.reason,
        world_size=start.world_size,
        buffer_size=start.buffer_size,
        num_buffers=start.num_buffers,
        staging=start.staging,
        pool=start.pool,
    )
