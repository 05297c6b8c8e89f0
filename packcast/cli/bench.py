"""`packcast bench`: options in, ranks at work, a table out; then the gate and the profile.

Nothing here imports torch but what starts the ranks, or is one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from packcast.bench.results import Results, best_rows, case_label
from packcast.bench.rows import Row, grouped
from packcast.bench.targets import Target, export_targets
from packcast.cli import benchoptions as bo
from packcast.cli import options as opt
from packcast.cli.benchsettings import bench_settings, default_nproc, least_rate, pin_defaults
from packcast.cli.helps import HEARTBEAT_TIMEOUT, JOIN_TIMEOUT, STAGING, STALL_TIMEOUT
from packcast.cli.outcome import Outcome, command_failure
from packcast.cli.profile import choose, profile_path, save_profile
from packcast.cli.start import be_a_rank, begin, start_ranks
from packcast.cli.terminal import say
from packcast.errors import (
    PackcastError,
    TransferError,
    UsageError,
    VerificationError,
    error_from_code,
)
from packcast.units import format_exact_size, format_rate

if TYPE_CHECKING:
    from packcast.bench.model import BenchSettings
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
    no_check: bo.NoCheck = False,
    no_baselines: bo.NoBaselines = False,
    no_limits: bo.NoLimits = False,
    nproc: bo.Nproc = None,
    port: opt.Port = None,
    token_file: opt.TokenFile = None,
    staging: bo.Staging = STAGING,
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
    save_profile_wanted: bo.SaveProfile = False,
    profile: bo.ProfileFile = None,
    progress: opt.Progress = "auto",
    quiet: bo.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    outcome = begin(context, "bench", json=None, verbose=verbose)
    least = least_rate(min_bandwidth) if min_bandwidth is not None else None
    alone = outcome.launch.kind == "none"

    def num_ranks() -> int:
        if not alone:
            return outcome.launch.local_world_size
        return nproc or default_nproc(backend, device)

    settings = bench_settings(
        checkpoint=checkpoint,
        shape=shape,
        size=size,
        source=source,
        sink=sink,
        cold=cold,
        directory=directory,
        write_directory=write_directory,
        buffer_size=buffer_size,
        num_buffers=num_buffers,
        readers=readers,
        runs=runs,
        warmup=warmup,
        no_check=no_check,
        no_baselines=no_baselines,
        no_limits=no_limits,
        port=port,
        token_file=token_file,
        staging=staging,
        backend=backend,
        device=device,
        join_timeout=join_timeout,
        heartbeat_timeout=heartbeat_timeout,
        stall_timeout=stall_timeout,
        launch=outcome.launch,
        num_ranks=num_ranks,
        environ=os.environ,
    )
    exports: tuple[Target, ...] = ()
    draw = None
    if outcome.launch.rank == 0:  # other hosts need not have the directories
        paths = {
            "--export-json": export_json,
            "--export-csv": export_csv,
            "--export-markdown": export_markdown,
        }
        exports = export_targets(paths)
        draw = _plotter(plot) if plot is not None else None
    if alone:
        pin_defaults(settings, os.environ)
        return start_ranks(outcome, num_ranks())
    if nproc is not None:
        raise UsageError(
            f"--nproc is for use without a launcher; this process was started by "
            f"{outcome.launch.kind}, which says how many ranks there are"
        )
    from packcast.cli.benchview import make_bench_display  # rich, which --help does without

    display = make_bench_display(progress, _command_line(outcome), exports, draw, quiet=quiet)
    save_to = profile_path(profile, os.environ) if save_profile_wanted else None
    return _measure(outcome, settings, display, least, save_to, quiet=quiet)


def _measure(
    outcome: Outcome,
    settings: BenchSettings,
    display: BenchDisplay,
    least: float | None,
    save_to: Path | None,
    *,
    quiet: bool,
) -> int:
    """Be one of the ranks; the sender's display is told everything, the others' nothing."""
    outcome.before_error = display.end  # the rows so far, also where a signal ends it
    leaver = be_a_rank(outcome)
    try:
        from packcast import bench as ranks

        code = ranks.run(settings, display, leaver)
    except (Exception, KeyboardInterrupt) as error:
        leaver.leave(command_failure(error))
    results = display.results
    if results.environment is None:  # another rank than the sender
        return code
    missed = verdict(results.rows, least)
    if code and not missed:
        missed = error_from_code(code, "a baseline failed its check; see the warnings")
    display.end(missed)
    if missed:
        raise missed
    if save_to:
        _save(save_to, results, quiet=quiet)
    return 0


def verdict(rows: Sequence[Row], least: float | None) -> PackcastError | None:
    """What makes a bench that ran to its end a failure: wrong bytes, no row, a slow best row.

    `least` is --min-bandwidth in bytes per second: each combination's best row must reach it.
    """
    ours = [row for row in rows if row.is_ours]
    wrong = [row for row in ours if row.wrong]
    if wrong:
        more = f" and {len(wrong) - 1} more rows" if len(wrong) > 1 else ""
        return VerificationError(
            f"wrong bytes arrived: {wrong[0].wrong} blocks or tensors in "
            f"{case_label(wrong[0].case)}{more}",
            hint="--export-json has the numbers of every run and rank",
        )
    best = {row.combination: row for row in best_rows(rows)}
    for combination, group in grouped(ours).items():
        name = "{}, {} to {}".format(*combination)
        if combination not in best:
            return TransferError(f"nothing could be measured of {name}: {group[0].failure}")
        rate = best[combination].bytes_per_second or 0.0
        if least is not None and rate < least:
            return TransferError(
                f"{name} reached {format_rate(rate)}, less than --min-bandwidth "
                f"{format_rate(least)}"
            )
    return None


def _save(path: Path, results: Results, *, quiet: bool) -> None:
    assert results.environment is not None
    row = choose(results.rows)
    if row is None:
        say("packcast: warning: no profile is saved: no row is of --source file, as in `send`")
        return
    save_profile(path, results.environment.backend, row)
    if not quiet:
        buffers = f"{format_exact_size(row.case.buffer_size)} x {row.case.num_buffers}"
        say(f"{results.environment.backend}: {buffers} saved as profile in {path}")


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
