"""The commands: each reads its options into Settings, makes one call and tells the outcome.

Nothing here imports torch; what needs it is imported inside the command that needs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import packcast
from packcast.cli import options as opt
from packcast.cli import settings as given
from packcast.cli.outcome import Outcome, as_packcast_error
from packcast.cli.progress import make_view
from packcast.cli.tables import Listing
from packcast.cli.terminal import say
from packcast.errors import PackcastError, UsageError
from packcast.group.launch import detect_launch
from packcast.group.leave import Leaver, die_with_parent, record_failure, watch_signals
from packcast.group.nproc import LAUNCHER_PID_VARIABLE, run_nproc
from packcast.settings import (
    DEFAULT_BUFFER_SIZE,
    DEFAULT_HEARTBEAT_TIMEOUT_S,
    DEFAULT_JOIN_TIMEOUT_S,
    DEFAULT_NUM_BUFFERS,
    DEFAULT_STAGING,
    DEFAULT_STALL_TIMEOUT_S,
    Settings,
)
from packcast.units import format_exact_size

# As they are typed, so that --help shows them so.
BUFFER_SIZE = format_exact_size(DEFAULT_BUFFER_SIZE)
STAGING = format_exact_size(DEFAULT_STAGING)
JOIN_TIMEOUT = f"{DEFAULT_JOIN_TIMEOUT_S / 60:g}min"
HEARTBEAT_TIMEOUT = f"{DEFAULT_HEARTBEAT_TIMEOUT_S:g}s"
STALL_TIMEOUT = f"{DEFAULT_STALL_TIMEOUT_S / 60:g}min"

COMMANDS = ("send", "recv", "inspect")
EVERY_OPTION = "Every option also reads PACKCAST_<NAME>, as in PACKCAST_BUFFER_SIZE=64MiB."
# One line per paragraph: the help is wrapped to the terminal, but keeps the lines that it is given.
SEND_HELP = """Send a checkpoint to every worker.

In a single launch (torchrun, Slurm, --nproc) every rank runs this command: \
the lowest rank sends; the others write to --out, compare with --verify, \
or, with neither, check digests and drop the bytes."""
RECV_HELP = """Receive a checkpoint: write it, compare it with a local one, or drop it.

Without a launcher, HOST:PORT is where `packcast send --workers N` listens. \
It may be started before the sender."""
SEND_EXAMPLES = f"""Example, three ranks on this machine: \
packcast send CKPT --out '/local/copy-{{rank}}' --nproc 3

Example, two other hosts: packcast send CKPT --workers 2 --listen node1:29400

{EVERY_OPTION}"""
RECV_EXAMPLES = f"""Example: packcast recv node1:29400 --out /local/model

{EVERY_OPTION}"""

app = typer.Typer(
    name="packcast",
    help="Broadcast a safetensors checkpoint from one process to many, byte for byte proven.",
    epilog="Example: packcast send CKPT --out '/local/copy-{rank}' --nproc 3",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(argv: list[str]) -> int:
    """Run one command line; the exit code. Every error that a command raises ends here."""
    outcome = Outcome(argv=argv)
    try:
        code = app(argv, prog_name="packcast", standalone_mode=False, obj=outcome)
    except typer.TyperException as error:  # the parser's own: unknown options, missing arguments
        words = ["packcast", *(word for word in argv[:1] if word in COMMANDS), "--help"]
        wrong = UsageError(error.format_message().rstrip("."), hint=f"see `{' '.join(words)}`")
        return _fail(outcome, wrong)
    except (Exception, KeyboardInterrupt) as error:
        return _fail(outcome, as_packcast_error(error))
    return code if isinstance(code, int) else 0


def _fail(outcome: Outcome, error: PackcastError) -> int:
    record_failure(error)  # for torchrun, which flattens exit codes
    outcome.failed(error)
    return error.exit_code


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"packcast {packcast.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Hold the options of no command."""


@app.command(help=SEND_HELP, epilog=SEND_EXAMPLES)
def send(
    context: typer.Context,
    checkpoint: opt.Checkpoint,
    out: opt.Out = None,
    verify: opt.Verify = None,
    force: opt.Force = False,
    no_sidecars: opt.NoSidecars = False,
    all_files: opt.AllFiles = False,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    dry_run: opt.DryRun = False,
    nproc: opt.Nproc = None,
    workers: opt.Workers = None,
    listen: opt.Listen = None,
    port: opt.Port = None,
    token_file: opt.TokenFile = None,
    readers: opt.Readers = "1",
    buffer_size: opt.BufferSize = BUFFER_SIZE,
    num_buffers: opt.NumBuffers = DEFAULT_NUM_BUFFERS,
    staging: opt.Staging = STAGING,
    backend: opt.BackendChoice = "auto",
    device: opt.Device = "auto",
    join_timeout: opt.JoinTimeout = JOIN_TIMEOUT,
    heartbeat_timeout: opt.HeartbeatTimeout = HEARTBEAT_TIMEOUT,
    stall_timeout: opt.StallTimeout = STALL_TIMEOUT,
    json: opt.Json = None,
    progress: opt.Progress = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    outcome = _begin(context, "send", json=json, verbose=verbose)
    sink, target = given.destination(out, verify)
    outcome.settings = Settings(
        command="send",
        checkpoint=Path(checkpoint),
        sink=sink,
        target=target,
        force=force,
        sidecars=not no_sidecars,
        all_files=all_files,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        readers=given.readers(readers),
        **given.buffers(buffer_size, num_buffers, staging),
        backend=backend,
        device=given.device(device),
        workers=workers,
        address=given.address("--listen", listen) if listen else None,
        port=port,
        token=given.token(token_file, os.environ),
        **given.limits(join_timeout, heartbeat_timeout, stall_timeout),
    )
    if dry_run:
        from packcast.cli.dryrun import dry_run as dry_run_of

        return _show(outcome, dry_run_of(outcome.settings), quiet=quiet)
    given.check_send(outcome.settings, outcome.launch, nproc=nproc)
    if nproc is not None:
        return _start_ranks(outcome, nproc)
    return _move(outcome, outcome.settings, progress, quiet=quiet)


@app.command(help=RECV_HELP, epilog=RECV_EXAMPLES)
def recv(
    context: typer.Context,
    address: opt.Address = None,
    out: opt.Out = None,
    verify: opt.Verify = None,
    discard: opt.Discard = False,
    force: opt.Force = False,
    rank: opt.Rank = None,
    port: opt.Port = None,
    token_file: opt.TokenFile = None,
    device: opt.Device = "auto",
    join_timeout: opt.JoinTimeout = JOIN_TIMEOUT,
    heartbeat_timeout: opt.HeartbeatTimeout = HEARTBEAT_TIMEOUT,
    stall_timeout: opt.StallTimeout = STALL_TIMEOUT,
    json: opt.Json = None,
    progress: opt.Progress = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    outcome = _begin(context, "recv", json=json, verbose=verbose)
    sink, target = given.destination(out, verify, discard=discard, required=True)
    outcome.settings = Settings(
        command="recv",
        sink=sink,
        target=target,
        force=force,
        device=given.device(device),
        address=given.address("HOST:PORT", address) if address else None,
        port=port,
        token=given.token(token_file, os.environ),
        rank=rank,
        **given.limits(join_timeout, heartbeat_timeout, stall_timeout),
    )
    given.check_recv(outcome.settings, outcome.launch, json=json)
    return _move(outcome, outcome.settings, progress, quiet=quiet)


@app.command(epilog="Example: packcast inspect CKPT --tensors")
def inspect(
    context: typer.Context,
    checkpoint: opt.Checkpoint,
    tensors: opt.Tensors = False,
    all_files: opt.AllFiles = False,
    json: opt.InspectJson = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Show what is in a checkpoint: files, sizes, tensors, dtypes."""
    from packcast.cli.inspect import inspect as listing_of

    outcome = _begin(context, "inspect", json=json, verbose=verbose)
    listing = listing_of(Path(checkpoint), all_files=all_files, tensors=tensors)
    return _show(outcome, listing, quiet=quiet)


def _begin(context: typer.Context, command: str, *, json: str | None, verbose: bool) -> Outcome:
    """What even a wrong command line's end must know: -v and --json."""
    outcome = context.obj
    assert isinstance(outcome, Outcome)
    outcome.command, outcome.verbose = command, verbose
    if command != "inspect":
        outcome.launch = detect_launch(os.environ)
    outcome.json = given.json_target(json)
    return outcome


def _show(outcome: Outcome, listing: Listing, *, quiet: bool) -> int:
    """What was asked for on standard output: the text, or the JSON in its place."""
    if not quiet:
        for warning in listing.warnings:
            say(f"packcast: warning: {warning}")
    if outcome.json != "-":
        print(listing.text)
    outcome.write_document(listing.document)
    return 0


def _start_ranks(outcome: Outcome, nproc: int) -> int:
    os.environ.pop("PACKCAST_NPROC", None)  # or every rank would start ranks of its own
    argv = given.without_nproc(outcome.argv)
    return run_nproc(argv, nproc, verbose=outcome.verbose, say=say)


def _move(outcome: Outcome, settings: Settings, mode: opt.ProgressMode, *, quiet: bool) -> int:
    """Run the transfer. What goes wrong in it leaves through the leaver, which ends the process at
    once: tearing down a broken process group can hang."""
    outcome.display = make_view(mode, settings, outcome.launch, quiet=quiet)
    leaver = Leaver(outcome.failed)
    if outcome.launch.kind == "torchrun":  # --nproc is one too, and says who it is
        launcher = os.environ.get(LAUNCHER_PID_VARIABLE, "")
        die_with_parent(int(launcher) if launcher.isdecimal() else None)
    watch_signals(leaver)  # before torch, whose threads must inherit the mask
    if not outcome.verbose:
        # Or torch's own threads tell of a lost peer in thirty lines of C++, before we do in one.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from packcast import transfer

        report = transfer.run(settings, outcome.display, leaver)
    except (Exception, KeyboardInterrupt) as error:
        leaver.leave(as_packcast_error(error))
    code = outcome.finished(report)
    if not report.ends_cleanly:
        leaver.exit(code)
    return code
