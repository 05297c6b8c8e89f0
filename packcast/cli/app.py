"""The commands: each parses its options into Settings, makes one call and reports the outcome.

Imports no torch; a command that needs it imports it when it runs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

import typer

from packcast.checkpoint.checkpoint import mode_of
from packcast.cli import local
from packcast.cli import options as opt
from packcast.cli import parsing as given
from packcast.cli.afterwards import Afterwards
from packcast.cli.bench import bench
from packcast.cli.download import checkpoint_path
from packcast.cli.helps import (
    BENCH_EXAMPLES,
    BENCH_HELP,
    DOCTOR_EXAMPLES,
    HEARTBEAT_TIMEOUT,
    JOIN_TIMEOUT,
    RECV_EXAMPLES,
    RECV_HELP,
    SEND_EXAMPLES,
    SEND_HELP,
    STAGING,
    STALL_TIMEOUT,
    VERIFY_EXAMPLES,
    VERIFY_HELP,
)
from packcast.cli.jsonlog import JsonLog, Views
from packcast.cli.outcome import Outcome, command_failure
from packcast.cli.progress import make_view
from packcast.cli.standard_streams import flush_streams
from packcast.cli.start import (
    be_a_rank,
    begin,
    forget_service_links,
    name_variables,
    plain_words,
    start_ranks,
    typed_options,
    warner,
)
from packcast.cli.terminal import say
from packcast.errors import PackcastError, UsageError
from packcast.launch.exit import record_failure
from packcast.launch.secret import secret_folders, user_token
from packcast.settings import DEFAULT_NUM_BUFFERS, Settings
from packcast.view import View

COMMANDS = ("send", "recv", "bench", "inspect", "verify", "clean", "doctor")

app = typer.Typer(
    name="packcast",
    help="Broadcast a safetensors checkpoint from one process to many, verified byte for byte.",
    epilog="Example: packcast send CKPT --out '/local/copy-{rank}' --nproc 3",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(argv: list[str]) -> int:
    """Run one command line; the exit code. Every error that a command raises ends here."""
    outcome = Outcome(argv=argv)
    forget_service_links(os.environ)
    try:
        code = app(argv, prog_name="packcast", standalone_mode=False, obj=outcome)
        flush_streams()
    except typer.TyperException as error:  # the parser's own: unknown options, missing arguments
        words = ["packcast", *(word for word in argv[:1] if word in COMMANDS), "--help"]
        wrong = UsageError(
            plain_words(error.format_message().rstrip(".")), hint=f"see `{' '.join(words)}`"
        )
        return _fail(outcome, wrong)
    except (Exception, KeyboardInterrupt) as error:
        return _fail(outcome, command_failure(error))
    return code if isinstance(code, int) else 0


def _fail(outcome: Outcome, error: PackcastError) -> int:
    name_variables(error, outcome.argv, os.environ)
    record_failure(error)  # for torchrun, which flattens exit codes
    outcome.failed(error)
    return error.exit_code


def _show_version(wanted: bool) -> None:
    if wanted:
        from packcast.cli.doctor import version_line

        print(version_line())
        raise typer.Exit


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Hold the options of no command; without a command show help."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(help=SEND_HELP, epilog=SEND_EXAMPLES)
def send(
    context: typer.Context,
    checkpoint: opt.Checkpoint,
    out: opt.Out = None,
    verify: opt.Verify = None,
    force: opt.Force = False,
    in_place: opt.InPlace = False,
    no_sidecars: opt.NoSidecars = False,
    all_files: opt.AllFiles = False,
    follow_links: opt.FollowLinks = False,
    exclude_files: opt.ExcludeFiles = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    download: opt.Download = False,
    dry_run: opt.DryRun = False,
    nproc: opt.Nproc = None,
    workers: opt.Workers = None,
    listen: opt.Listen = None,
    port: opt.Port = None,
    port_range: opt.PortRange = None,
    token_file: opt.TokenFile = None,
    readers: opt.Readers = "1",
    max_rate: opt.MaxRate = None,
    buffer_size: opt.BufferSize = None,
    num_buffers: opt.NumBuffers = DEFAULT_NUM_BUFFERS,
    staging: opt.Staging = STAGING,
    backend: opt.BackendChoice = "auto",
    device: opt.Device = "auto",
    join_timeout: opt.JoinTimeout = JOIN_TIMEOUT,
    heartbeat_timeout: opt.HeartbeatTimeout = HEARTBEAT_TIMEOUT,
    stall_timeout: opt.StallTimeout = STALL_TIMEOUT,
    manifest: opt.Manifest = None,
    digest: opt.DigestChoice = "xxh128",
    report: opt.FileReport = None,
    json: opt.Json = None,
    log_json: opt.LogJson = None,
    progress: opt.Progress = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    outcome = begin(context, "send", json=json, verbose=verbose)
    log = given.log_target(log_json)
    path = checkpoint_path(
        checkpoint, download=download and outcome.launch.rank == 0, say=None if quiet else say
    )
    warn = warner(outcome, quiet=quiet)
    outcome.settings = given.settings("send", context.params, warn, checkpoint=path)
    if dry_run:
        from packcast.cli.dryrun import dry_run as dry_run_of

        return local.show(outcome, dry_run_of(outcome.settings, nproc), quiet=quiet)
    given.check_send(outcome.settings, outcome.launch, nproc=nproc)
    if outcome.launch.kind == "none":  # this host sends: a wrong path is said before torch comes
        mode_of(path)
    given.refuse_unused(
        typed_options(context),
        without_launcher=workers is not None,
        writes=out is not None,
        has_manifest=manifest is not None,
    )
    wanted = Afterwards(manifest, digest, report)
    wanted.check(outcome.settings, (nproc or outcome.launch.local_world_size) - 1)
    if nproc is not None:
        return start_ranks(outcome, nproc)
    if quiet and workers is not None and outcome.settings.token is None:
        # The output of a quiet command usually goes to a log that others may read: show no token.
        secret, file = user_token(secret_folders(os.environ))
        outcome.settings = replace(outcome.settings, token=secret, token_file=file)
    return _move(outcome, outcome.settings, wanted, progress, log=log, quiet=quiet)


@app.command(help=RECV_HELP, epilog=RECV_EXAMPLES)
def recv(
    context: typer.Context,
    address: opt.Address = None,
    out: opt.Out = None,
    verify: opt.Verify = None,
    discard: opt.Discard = False,
    force: opt.Force = False,
    in_place: opt.InPlace = False,
    rank: opt.Rank = None,
    port: opt.Port = None,
    token_file: opt.TokenFile = None,
    device: opt.Device = "auto",
    join_timeout: opt.JoinTimeout = JOIN_TIMEOUT,
    heartbeat_timeout: opt.HeartbeatTimeout = HEARTBEAT_TIMEOUT,
    stall_timeout: opt.StallTimeout = STALL_TIMEOUT,
    manifest: opt.Manifest = None,
    digest: opt.DigestChoice = "xxh128",
    report: opt.FileReport = None,
    json: opt.Json = None,
    log_json: opt.LogJson = None,
    progress: opt.Progress = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    outcome = begin(context, "recv", json=json, verbose=verbose)
    log = given.log_target(log_json)
    warn = warner(outcome, quiet=quiet)
    outcome.settings = given.settings("recv", context.params, warn)
    given.check_recv(outcome.settings, outcome.launch, json=json, log=log)
    given.refuse_unused(
        typed_options(context),
        without_launcher=False,
        writes=out is not None,
        has_manifest=manifest is not None,
    )
    wanted = Afterwards(manifest, digest, report)
    wanted.check(outcome.settings, outcome.launch.local_world_size)
    return _move(outcome, outcome.settings, wanted, progress, log=log, quiet=quiet)


app.command(help=BENCH_HELP, epilog=BENCH_EXAMPLES)(bench)


app.command(epilog="Example: packcast inspect CKPT --tensors")(local.inspect)
app.command(help=VERIFY_HELP, epilog=VERIFY_EXAMPLES)(local.verify)
app.command(epilog="Example: packcast clean /local")(local.clean)
app.command(epilog=DOCTOR_EXAMPLES)(local.doctor)


def _move(
    outcome: Outcome,
    settings: Settings,
    wanted: Afterwards,
    mode: opt.ProgressMode,
    *,
    log: str | None,
    quiet: bool,
) -> int:
    """Run the transfer. A failure in it ends the process at once, through the exit handler: tearing
    down a broken process group can hang."""
    outcome.display = make_view(mode, settings, outcome.launch, quiet=quiet)
    outcome.display.verbose = outcome.verbose
    view: View = outcome.display
    if log is not None:
        outcome.log = JsonLog(log, outcome.launch)
        view = Views(outcome.display, outcome.log)
    exit_handler = be_a_rank(outcome)
    try:
        view.phase("load")
        from packcast import transfer

        report = transfer.run(settings, view, exit_handler)
        report = wanted.write(report, outcome.launch)
    except (Exception, KeyboardInterrupt) as error:
        exit_handler.leave(command_failure(error))
    code = outcome.finished(report)
    if not report.ends_cleanly:
        exit_handler.exit(code)
    return code
