"""All errors, each with its exit code.

PackcastError                 1   (a bug)
+-- UsageError                2
+-- CheckpointError           3   what is on disk is not a checkpoint, or changed under us
+-- RendezvousError           4   the group: ranks are missing, too many, or incompatible
+-- TransferError             5   the transfer itself: a lost rank, damaged bytes, a time limit
+-- VerificationError         6   a difference was found
+-- DestinationError          7   exists, no space, no permission
+-- Interrupted         130/143   SIGINT / SIGTERM, SIGHUP
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packcast.report import Report


class PackcastError(Exception):
    """A message, and as `hint` the next step; one or two lines together.

    A library call sets `report` if the transfer reached its end: a difference was found, or a
    worker could not publish. The hint may name an option of the
    command line (`--force`); the argument has the same name (`force`).
    """

    exit_code = 1
    report: Report | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PackcastError, ValueError):
    """Invalid command line, or invalid arguments of a library call. A ValueError for pydantic."""

    exit_code = 2


class CheckpointError(PackcastError):
    """The checkpoint is missing, malformed, or changed while it was being read."""

    exit_code = 3


class RendezvousError(PackcastError):
    """Not all ranks joined, or they are incompatible."""

    exit_code = 4


class TransferError(PackcastError):
    """A rank was lost, bytes were damaged in transit, or a time limit expired."""

    exit_code = 5


class VerificationError(PackcastError):
    """The compared bytes differ."""

    exit_code = 6


class DestinationError(PackcastError):
    """The target exists, has no space or may not be written."""

    exit_code = 7


class Interrupted(PackcastError):
    """A signal asked this process to stop; `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a sentence; of one that says nothing, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_descriptors(error: BaseException) -> TransferError | None:
    """The error for a limit of open files that is reached; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    whose = "this process" if error.errno == errno.EMFILE else "this host"
    wrapped = TransferError(
        f"{whose} has reached its limit of open files and sockets",
        hint="raise the limit, as with `ulimit -n`",
    )
    wrapped.__cause__ = error
    return wrapped


def as_packcast_error(error: Exception, doing: str) -> PackcastError:
    """`error` itself if it is a PackcastError, else the report of a bug while `doing` something."""
    if isinstance(error, PackcastError):
        return error
    if known := out_of_descriptors(error):
        return known
    wrapped = PackcastError(f"{doing} failed: {error!r}")
    wrapped.__cause__ = error
    return wrapped


def error_from_code(exit_code: int, message: str, hint: str | None = None) -> PackcastError:
    """The error that another rank reported, made again here from what travels on the wire."""
    for kind in (
        UsageError,
        CheckpointError,
        RendezvousError,
        TransferError,
        VerificationError,
        DestinationError,
    ):
        if kind.exit_code == exit_code:
            return kind(message, hint=hint)
    return (
        TransferError(message, hint=hint) if exit_code > 128 else PackcastError(message, hint=hint)
    )
