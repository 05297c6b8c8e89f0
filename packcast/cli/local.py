"""The commands without a transfer: inspect, verify, clean, doctor.

Each parses its options, makes one call and prints the result.
"""

from __future__ import annotations

from pathlib import Path

import typer

from packcast.cli import options as opt
from packcast.cli import parsing as given
from packcast.cli.download import checkpoint_path
from packcast.cli.outcome import Outcome
from packcast.cli.start import begin
from packcast.cli.tables import Listing
from packcast.cli.terminal import say
from packcast.errors import PackcastError
from packcast.settings import check_address_to_reach, named


def inspect(
    context: typer.Context,
    checkpoint: opt.Checkpoint,
    tensors: opt.Tensors = False,
    all_files: opt.AllFiles = False,
    follow_links: opt.FollowLinks = False,
    exclude_files: opt.ExcludeFiles = None,
    json: opt.InspectJson = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Show what is in a checkpoint: files, sizes, tensors, dtypes."""
    from packcast.cli.inspect import inspect as listing_of

    outcome = begin(context, "inspect", json=json, verbose=verbose)
    listing = listing_of(
        checkpoint_path(checkpoint),
        all_files=all_files,
        follow_links=follow_links,
        exclude_files=tuple(exclude_files or ()),
        tensors=tensors,
    )
    return show(outcome, listing, quiet=quiet)


def clean(
    context: typer.Context,
    folder: opt.Folder,
    yes: opt.Yes = False,
    json: opt.InspectJson = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """List partial copies that killed transfers left behind; remove them with --yes."""
    from packcast.cli.clean import clean as cleaned

    outcome = begin(context, "clean", json=json, verbose=verbose)
    listing, failure = cleaned(Path(folder), yes=yes)
    return _show_all(outcome, listing, failure, quiet=quiet)


def verify(
    context: typer.Context,
    directories: opt.Directories,
    against: opt.Against = None,
    manifest: opt.Manifest = None,
    digest: opt.DigestChoice = "xxh128",
    report: opt.FileReport = None,
    all_files: opt.AllFiles = False,
    exclude_files: opt.ExcludeFiles = None,
    json: opt.InspectJson = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    from packcast.cli.verify_copies import VerifyOptions
    from packcast.cli.verify_copies import verify as verified

    outcome = begin(context, "verify", json=json, verbose=verbose)
    options = VerifyOptions(
        directories=tuple(map(checkpoint_path, directories)),
        against=given.path(against) if against else None,
        manifest=given.path(manifest) if manifest else None,
        digest=digest,
        report=given.path(report) if report else None,
        all_files=all_files,
        exclude_files=tuple(exclude_files or ()),
    )
    listing, failure = verified(options, quiet=quiet)
    return _show_all(outcome, listing, failure, quiet=quiet)


def doctor(
    context: typer.Context,
    folders: opt.Folders = None,
    reach: opt.Reach = None,
    no_test: opt.NoTest = False,
    json: opt.InspectJson = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Say what this machine is, what is wrong with it and what to do; send to itself as a test."""
    from packcast.cli.doctor import doctor as examined

    outcome = begin(context, "doctor", json=json, verbose=verbose)
    told = json != "-" and not quiet
    listing, failure = examined(
        [given.path(folder) for folder in folders or ["."]],
        reach=named("--reach", lambda text: check_address_to_reach(given.address(text)), reach)
        if reach
        else None,
        tests=not no_test,
        tell=print if told else lambda line: None,
    )
    return _show_all(outcome, listing, failure, quiet=quiet)


def _show_all(
    outcome: Outcome, listing: Listing, failure: PackcastError | None, *, quiet: bool
) -> int:
    """Print a listing, then its warnings; returns the exit code."""
    show(outcome, listing, quiet=quiet)
    if failure is None:
        return 0
    say(f"packcast: error: {failure.message}")
    return failure.exit_code


def show(outcome: Outcome, listing: Listing, *, quiet: bool) -> int:
    """Print the listing to standard output, as text or as JSON."""
    if not quiet:
        for warning in listing.warnings:
            say(f"packcast: warning: {warning}")
    if outcome.json != "-":
        print(listing.text)
    outcome.write_document(listing.document)
    return 0
