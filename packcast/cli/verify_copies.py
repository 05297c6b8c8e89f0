"""`packcast verify`: compare copies with a manifest or with each other; no transfer, no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packcast.cli.progress import PlainLines
from packcast.cli.result import comparison_document, count, ending
from packcast.cli.tables import Listing
from packcast.cli.terminal import printable, say
from packcast.comparison import ComparedFile, Comparison
from packcast.errors import DestinationError, UsageError, VerificationError
from packcast.io.compare import LocalCopy, compare_copies, compare_with_manifest, local_files
from packcast.io.manifest import (
    SUFFIXES,
    DigestKind,
    hash_files,
    manifest_beside,
    read_manifest,
    refuse_inside,
    write_manifest,
)
from packcast.units import format_duration, format_size, format_speed
from packcast.view import Snapshot

_MAX_NAMED = 20  # of each kind in the text; the JSON and --report have all
_WORDS = {"*": "differs", "-": "missing", "+": "extra", "!": "unreadable"}


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """The copies, what to compare them with, and the files to write."""

    directories: tuple[Path, ...]
    against: Path | None = None
    manifest: Path | None = None
    digest: DigestKind = "xxh128"
    report: Path | None = None
    all_files: bool = False
    exclude_files: tuple[str, ...] = ()


def verify(options: VerifyOptions, *, quiet: bool) -> tuple[Listing, VerificationError | None]:
    """Compare, and write the files; the error says how many copies differ.

    Raises UsageError if there is nothing to compare with, CheckpointError if the reference is
    unreadable.
    """
    began = time.monotonic()
    first, *others = [
        local_files(path, all_files=options.all_files, exclude_files=options.exclude_files)
        for path in options.directories
    ]
    against = options.against
    if against is None and not others and options.manifest is None:
        against = manifest_beside(first.path)
        if against is None:
            raise _nothing_to_compare_with(first.path)
    if options.manifest is not None:
        refuse_inside(options.manifest, first.root)
    if against is not None:
        kind, hashes = read_manifest(against)
        copies = [first, *others]
        progress = _Counted(copies, quiet=quiet)
        comparisons = [
            compare_with_manifest(copy, against, kind, hashes, progress.add) for copy in copies
        ]
    else:
        copies = others
        progress = _Counted([first, *copies] if options.manifest else copies, quiet=quiet)
        comparisons = [compare_copies(first, copy, progress.add) for copy in copies]
    if options.manifest is not None:
        hashes = hash_files(first.root, list(first.files), options.digest, on_bytes=progress.add)
        write_manifest(options.manifest, first.root, hashes)
    progress.close()
    if options.report is not None:
        write_report(options.report, comparisons)
    failure = _failure(comparisons)
    seconds = time.monotonic() - began
    text = _text(comparisons, first, options.manifest, progress.nbytes, seconds)
    return Listing(text, _document(comparisons, options, failure, progress.nbytes, seconds), ()), (
        failure
    )


def _nothing_to_compare_with(path: Path) -> UsageError:
    beside = f"{str(path).rstrip('/')}{SUFFIXES['xxh128']}"
    return UsageError(
        f"{path}: nothing to compare it with: there is no {beside}",
        hint="give another copy, or a manifest with --against; --manifest FILE writes one",
    )


def write_report(path: Path, comparisons: Iterable[Comparison]) -> None:
    """Every file and tensor with its mark; raises DestinationError."""
    lines = (line for comparison in comparisons for line in comparison.lines())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(printable(line).replace("\\t", "\t") + "\n" for line in lines)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DestinationError(f"--report: {path}: {error.strerror}") from error


def _failure(comparisons: Sequence[Comparison]) -> VerificationError | None:
    wrong = [comparison for comparison in comparisons if not comparison.equal]
    if not wrong:
        return None
    if len(comparisons) == 1:
        return VerificationError(f"{wrong[0].path} differs from {wrong[0].against}")
    number = f"{len(wrong)} of {len(comparisons)} copies"
    verb = "differs" if len(wrong) == 1 else "differ"
    return VerificationError(f"{number} {verb}: {', '.join(it.path for it in wrong[:4])}")


def _text(
    comparisons: Sequence[Comparison],
    first: LocalCopy,
    manifest: Path | None,
    nbytes: int,
    seconds: float,
) -> str:
    lines = [line for comparison in comparisons for line in comparison_lines(comparison)]
    if manifest is not None:
        lines.append(f"{manifest}: {count(len(first.files), 'file')} of {first.path}")
    took = f"{format_duration(seconds)}, {format_speed(nbytes / seconds if seconds else 0.0)}"
    return "\n".join([*lines, f"{format_size(nbytes)} read in {took}"])


def comparison_lines(comparison: Comparison) -> list[str]:
    """One copy as text: that it is the same, or every file that differs."""
    path, against = comparison.path, comparison.against
    if comparison.equal:
        return [f"{path}: identical to {against}, {count(len(comparison.files), 'file')}"]
    lines = [f"{path}: differs from {against}"]
    wrong = comparison.marked("*", "-", "+", "!")
    lines += [f"  {_file_line(file)}" for file in wrong[:_MAX_NAMED]]
    if len(wrong) > _MAX_NAMED:
        lines.append(f"  and {count(len(wrong) - _MAX_NAMED, 'more file')}")
    same = len(comparison.files) - len(wrong)
    lines.append(f"  the same: {same:,} of {count(len(comparison.files), 'file')}")
    return [printable(line) for line in lines]


def _file_line(file: ComparedFile) -> str:
    line = f"{_WORDS[file.mark]:<11}{file.name}"
    if file.mark in ("-", "+"):
        return line
    if file.reason:
        line += f": {file.reason}"
    wrong = file.tensors_marked("*", "-", "+")
    if wrong:
        named = ", ".join(wrong[:_MAX_NAMED])
        more = f" and {len(wrong) - _MAX_NAMED:,} more" if len(wrong) > _MAX_NAMED else ""
        line += f"; {len(wrong):,} of {count(len(file.tensors), 'tensor')}: {named}{more}"
    return line


def _document(
    comparisons: Sequence[Comparison],
    options: VerifyOptions,
    failure: VerificationError | None,
    nbytes: int,
    seconds: float,
) -> dict[str, object]:
    return {
        **ending("verify", failure),
        "copies": [comparison_document(comparison) for comparison in comparisons],
        "manifest": None if options.manifest is None else str(options.manifest),
        "bytes": nbytes,
        "seconds": seconds,
    }


class _Counted:
    """Counts the bytes read, on any thread, and prints the count every ten seconds."""

    def __init__(self, copies: Sequence[LocalCopy], *, quiet: bool) -> None:
        self.nbytes = 0
        self._total = 0 if quiet else sum(copy.nbytes for copy in copies)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._lines = PlainLines(time.monotonic())
        if not quiet:
            threading.Thread(target=self._watch, name="packcast-progress", daemon=True).start()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            now = time.monotonic()
            snapshot = Snapshot(min(self.nbytes, self._total), self._total, {}, {})
            line = self._lines.next_line(snapshot, now)
            if line:
                say(line)
