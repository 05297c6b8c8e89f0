"""`packcast bench`: options in, ranks at work, a table out; then the verdict.

Nothing here imports torch but what starts the ranks, or is one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from packcast.bench.export_files import ExportFile, export_files
from packcast.bench.model import OURS, BenchSettings, Results, Row
from packcast.bench.stats import best_rows, grouped, rate_of, shown, wrong_of
from packcast.cli import benchoptions as bo
from packcast.cli import benchsettings as read
from packcast.cli import options as opt
from packcast.cli import parsing as given
from packcast.cli.helps import HEARTBEAT_TIMEOUT, JOIN_TIMEOUT, STAGING, STALL_TIMEOUT
from packcast.cli.outcome import Outcome, command_failure
from packcast.cli.start import be_a_rank, begin, start_ranks
from packcast.errors import (
    PackcastError,
    TransferError,
    UsageError,
    VerificationError,
    error_from_code,
)
from packcast.launch.validation import check_port
from packcast.packed.plan import check_staging
from packcast.units import format_rate, parse_rate

if TYPE_CHECKING:
    from packcast.cli.benchview import BenchDisplay


def bench(
    context: typer.Context,
    checkpoint: bo.Checkpoint = None,
    shape: bo.Shape = None,
    size: bo.Size = None,
    source: bo.Source = "file",
    sink: bo.Sink = None,
    cold: bo.Cold = False,
    directory: bo.Directory = None,
    write_directory: bo.WriteDirectory = None,
    buffer_size: bo.BufferSizes = "4MiB,16MiB,64MiB",
    num_buffers: bo.BufferCounts = "2,4",
    readers: bo.Readers = "1",
    runs: bo.Runs = 3,
    warmup: bo.Warmup = 1,
    no_baselines: bo.NoBaselines = False,
    no_limits: bo.NoLimits = False,
    nproc: bo.Nproc = None,
    port: opt.Port = None,
    port_range: opt.PortRange = None,
    token_file: opt.TokenFile = None,
    staging: opt.Staging = STAGING,
    backend: opt.BackendChoice = "auto",
    device: opt.Device = "auto",
    join_timeout: opt.JoinTimeout = JOIN_TIMEOUT,
    heartbeat_timeout: opt.HeartbeatTimeout = HEARTBEAT_TIMEOUT,
    stall_timeout: opt.StallTimeout = STALL_TIMEOUT,
    export_json: bo.ExportJson = None,
    export_csv: bo.ExportCsv = None,
    export_markdown: bo.ExportMarkdown = None,
    plot: bo.Plot = None,
    min_bandwidth: bo.MinBandwidth = None,
    progress: opt.Progress = "auto",
    quiet: bo.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    outcome = begin(context, "bench", json=None, verbose=verbose)
    least = None
    if min_bandwidth is not None:
        least = given.parsed("--min-bandwidth", min_bandwidth, parse_rate)
    alone = outcome.launch.kind == "none"
    nbytes = read.size_of_weights(size, backend, device)
    sources = read.choices("--source", source, read.SOURCES)
    sinks = read.choices("--sink", sink, read.SINKS) if sink else read.default_sinks(sources)
    check_port(port, outcome.launch, given.option)

    def num_ranks() -> int:
        if not alone:
            return outcome.launch.local_world_size
        return nproc or read.default_nproc(backend, device)

    if directory:
        where = read.directory("--dir", directory)
    else:  # counting ranks may mean counting GPUs, which takes torch seconds
        where = read.default_directory(
            nbytes, write_too="write" in sinks, num_ranks=num_ranks(), cold=cold
        )
    settings = BenchSettings(
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        shapes=() if checkpoint else read.choices("--shape", shape or "dense", read.SHAPES),
        size=nbytes,
        sources=sources,
        sinks=sinks,
        readers=read.readers("--readers", readers),
        buffer_sizes=read.buffer_sizes("--buffer-size", buffer_size),
        num_buffers=read.buffer_counts("--num-buffers", num_buffers),
        runs=runs,
        warmup=warmup,
        directory=where,
        write_directory=read.directory("--write-dir", write_directory)
        if write_directory
        else where,
        cold=cold,
        baselines=not no_baselines,
        limits=not no_limits,
        staging=given.size("--staging", staging),
        backend=backend,
        device=given.device(device),
        port=port,
        port_range=given.port_range(port_range),
        token=given.token(token_file, os.environ),
        **given.limits(join_timeout, heartbeat_timeout, stall_timeout),
    )
    read.check_what(settings, shape=shape, size=size)
    for one in settings.buffer_sizes:
        check_staging(one, settings.staging)
    exports: tuple[ExportFile, ...] = ()
    draw = None
    if outcome.launch.rank == 0:  # other hosts need not have the directories
        exports = export_files(
            {
                "--export-json": export_json,
                "--export-csv": export_csv,
                "--export-markdown": export_markdown,
            }
        )
        draw = _plotter(plot) if plot is not None else None
    if alone:
        read.pin_defaults(settings, os.environ)
        return start_ranks(outcome, num_ranks())
    if nproc is not None:
        raise UsageError(
            f"--nproc is for use without a launcher; this process was started by "
            f"{outcome.launch.kind}, which sets the number of ranks",
            hint="leave out --nproc",
        )
    from packcast.cli.benchview import make_bench_display  # rich, which --help does without

    display = make_bench_display(progress, _command_line(outcome), exports, draw, quiet=quiet)
    return _measure(outcome, settings, display, least)


def _measure(
    outcome: Outcome, settings: BenchSettings, display: BenchDisplay, least: float | None
) -> int:
    """Be one of the ranks; the sender's display is told everything, the others' nothing."""
    outcome.before_error = display.end  # the rows so far, also where a signal ends it
    exit_handler = be_a_rank(outcome)
    try:
        from packcast import bench as ranks

        code = ranks.run(settings, display, exit_handler)
    except (Exception, KeyboardInterrupt) as error:
        exit_handler.leave(command_failure(error))
    results = display.results
    if results.environment is None:  # another rank than the sender
        return code
    missed = verdict(results.rows, least)
    if code and not missed:
        missed = error_from_code(code, "a baseline failed its check; see the warnings")
    display.end(missed)
    if missed:
        raise missed
    return 0


def verdict(rows: Sequence[Row], least: float | None) -> PackcastError | None:
    """What makes a bench that ran to its end a failure: wrong bytes, no row, a slow best row.

    `least` is --min-bandwidth in bytes per second: each table's best row must reach it.
    """
    ours = [row for row in shown(rows) if row.case.method in OURS]
    wrong = [row for row in ours if wrong_of(row)]
    if wrong:
        more = f" and {len(wrong) - 1} more rows" if len(wrong) > 1 else ""
        return VerificationError(
            f"wrong bytes arrived: {wrong_of(wrong[0])} blocks or tensors in {wrong[0].case}{more}",
            hint="--export-json has the numbers of every run and rank",
        )
    for combination, group in grouped(ours).items():
        name = "{}, {} to {}".format(*combination)
        best = best_rows(group)
        if not best:
            return TransferError(f"nothing could be measured of {name}: {group[0].failure}")
        rate = rate_of(best[0]) or 0.0
        if least is not None and rate < least:
            return TransferError(
                f"{name} reached {format_rate(rate)}, less than --min-bandwidth "
                f"{format_rate(least)}"
            )
    return None


def _plotter(text: str) -> Callable[[Results], None]:
    from packcast.bench.plot import check_plot, write_plot

    path = check_plot("--plot", text)
    return lambda results: write_plot(path, results)


def _command_line(outcome: Outcome) -> str:
    """What was typed, as far as the ranks can know."""
    words = ["packcast", *outcome.argv]
    if outcome.launch.kind == "nproc":
        words += ["--nproc", str(outcome.launch.world_size)]
    return shlex.join(words)
