"""`packcast clean`: list unused partial copies, and remove them with --yes.

Imports no torch. Never removes a copy that may be in use, or that has no record of its owner.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path

from packcast.checkpoint.suggestions import hint_for_path
from packcast.cli.result import count, ending
from packcast.cli.tables import Listing, table
from packcast.errors import DestinationError, UsageError
from packcast.io.sinks.partial import Partial, partials_in, partials_of, remove_if_unused
from packcast.units import format_size


def clean(folder: Path, *, yes: bool) -> tuple[Listing, DestinationError | None]:
    """List the partial copies in `folder` and beside it; with `yes` remove the unused ones.

    The error names the copies that could not be removed.
    """
    real = os.path.realpath(folder)
    try:
        os.listdir(real)
    except FileNotFoundError:
        raise UsageError(f"{folder}: no such directory", hint=hint_for_path(folder)) from None
    except NotADirectoryError:
        raise UsageError(
            f"{folder} is not a directory", hint="give the directory that copies were written into"
        ) from None
    except OSError as error:
        raise DestinationError(f"cannot read {folder}: {error.strerror}") from error
    found = {partial.path: partial for partial in (*partials_in(real), *partials_of(real))}
    partials = [partial for _, partial in sorted(found.items())]
    unused = [partial for partial in partials if partial.state == "unused"]
    gone = {partial.path for partial in unused if remove_if_unused(partial)} if yes else set()
    stuck = [partial.path for partial in unused if yes and partial.path not in gone]
    failure = None
    if stuck:
        failure = DestinationError(
            f"could not be removed: {', '.join(stuck)}", hint="check the permissions"
        )
    document = ending("clean", failure) | {
        "partials": [asdict(partial) | {"removed": partial.path in gone} for partial in partials]
    }
    text = _text(folder, partials, unused, gone, yes=yes)
    return Listing(text, document, ()), failure


def _text(
    folder: Path, partials: list[Partial], unused: list[Partial], gone: set[str], *, yes: bool
) -> str:
    if not partials:
        return f"no partial copies in {folder}"
    rows = [
        (
            partial.path,
            format_size(partial.nbytes),
            "removed" if partial.path in gone else partial.state,
            partial.owner or "",
        )
        for partial in partials
    ]
    lines = [table(("partial copy", ">size", "state", "made by"), rows), ""]
    nbytes = format_size(sum(partial.nbytes for partial in unused))
    if yes:
        lines.append(f"{count(len(gone), 'partial copy', 'partial copies')} removed")
    elif unused:
        lines.append(f"{len(unused)} unused, {nbytes}: remove with --yes")
    unknown = [shlex.quote(partial.path) for partial in partials if partial.state == "unknown"]
    if unknown:
        lines += [
            "unknown: packcast cannot tell whether it is used; it may be a complete copy, whose",
            f"process was killed before the last step. Unless a transfer runs: rm -r {unknown[0]}",
        ]
    return "\n".join(lines)
