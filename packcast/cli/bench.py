"""`packcast bench`: options to settings, the ranks, the table, and the exit code.

Imports torch only in a process that is a rank, or that counts the GPUs.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence

import typer

from packcast import bench as ranks
from packcast.bench.export import Exports
from packcast.bench.model import OURS, BenchSettings, Results, Row
from packcast.bench.stats import best_rows, grouped, shown
from packcast.cli import benchoptions as bo
from packcast.cli import benchsettings as read
from packcast.cli import options as opt
from packcast.cli import parsing
from packcast.cli.helps import HEARTBEAT_TIMEOUT, JOIN_TIMEOUT, STAGING, STALL_TIMEOUT
from packcast.cli.outcome import Outcome, command_failure
from packcast.cli.start import be_a_rank, begin, start_ranks
from packcast.errors import (
    PackcastError,
    TransferError,
    VerificationError,
    error_from_code,
)
from packcast.launch.validation import check_nproc, check_port
from packcast.settings import named
from packcast.units import format_rate, parse_rate


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
    no_check: bo.NoCheck = False,
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
        least = named("--min-bandwidth", parse_rate, min_bandwidth)
    alone = outcome.launch.kind == "none"
    nbytes = read.size_of_weights(size, backend, device)
    sources = read.choices("--source", source, read.SOURCES)
    sinks = read.choices("--sink", sink, read.SINKS) if sink else read.default_sinks(sources)
    check_port(port, outcome.launch, parsing.option)

    def num_ranks() -> int:
        """Asks torch for the number of GPUs, which takes seconds."""
        if not alone:
            return outcome.launch.local_world_size
        return nproc or read.default_nproc(backend, device)

    if directory:
        folder = read.directory("--dir", directory)
    else:
        folder = read.default_directory(
            nbytes, write_too="write" in sinks, num_ranks=num_ranks(), cold=cold
        )
    sizes = read.buffer_sizes("--buffer-size", buffer_size)
    counts = read.buffer_counts("--num-buffers", num_buffers)
    settings = BenchSettings(
        transfer=parsing.settings(
            "send",
            context.params,
            checkpoint=checkpoint,
            buffer_size=max(sizes),
            num_buffers=max(counts),
            readers=1,  # in each case its own
        ),
        shapes=() if checkpoint else read.choices("--shape", shape or "dense", read.SHAPES),
        size=nbytes,
        sources=sources,
        sinks=sinks,
        readers=read.readers(readers),
        buffer_sizes=sizes,
        num_buffers=counts,
        runs=runs,
        warmup=warmup,
        directory=folder,
        write_directory=read.directory("--write-dir", write_directory)
        if write_directory
        else folder,
        cold=cold,
        baselines=not no_baselines,
        limits=not no_limits,
        check=not no_check,
    )
    read.check_what(settings, shape=shape, size=size)
    exports: Exports = {}
    draw = None
    if outcome.launch.rank == 0:  # other hosts need not have the directories
        exports = read.exports(
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
    check_nproc(nproc, outcome.launch, parsing.option)
    from packcast.cli.benchview import make_bench_display  # rich, which --help does without

    display = make_bench_display(progress, _command_line(outcome), exports, draw, quiet=quiet)
    outcome.before_error = display.end  # the rows so far, also after a signal
    exit_handler = be_a_rank(outcome)
    try:
        code = ranks.run(settings, display, exit_handler)
    except (Exception, KeyboardInterrupt) as error:
        exit_handler.leave(command_failure(error))
    if display.results.environment is None:  # not the sender
        return code
    failure = verdict(display.results.rows, least)
    if code and not failure:
        failure = error_from_code(code, "a baseline failed its check; see the warnings")
    display.end(failure)
    if failure:
        raise failure
    return 0


def verdict(rows: Sequence[Row], least: float | None) -> PackcastError | None:
    """The failure of a bench that has run to its end: wrong bytes, no row, or a slow best row.

    `least` is --min-bandwidth in bytes per second, for the best row of each table.
    """
    ours = [row for row in shown(rows) if row.case.method in OURS]
    wrong = [row for row in ours if row.wrong]
    if wrong:
        more = f" and {len(wrong) - 1} more rows" if len(wrong) > 1 else ""
        return VerificationError(
            f"wrong bytes arrived: {wrong[0].wrong} blocks or tensors in {wrong[0].case}{more}",
            hint="--export-json has the numbers of every run and rank",
        )
    for (shape, source, sink), group in grouped(ours).items():
        best = best_rows(group)
        if not best:
            return TransferError(
                f"nothing could be measured of {shape}, {source} to {sink}: {group[0].failure}"
            )
        rate = best[0].rate or 0.0
        if least is not None and rate < least:
            return TransferError(
                f"{shape}, {source} to {sink} reached {format_rate(rate)}, less than"
                f" --min-bandwidth {format_rate(least)}"
            )
    return None


def _plotter(text: str) -> Callable[[Results], None]:
    from packcast.bench.plot import write_plot

    path = read.plot("--plot", text)
    return lambda results: write_plot(path, results)


def _command_line(outcome: Outcome) -> str:
    """The command line as typed, as far as a rank knows it."""
    words = ["packcast", *outcome.argv]
    if outcome.launch.kind == "nproc":
        words += ["--nproc", str(outcome.launch.world_size)]
    return shlex.join(words)
