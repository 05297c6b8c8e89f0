"""Where results are exported to: checked before the first run, written again after every case."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packcast.bench.export import to_csv, to_json, to_markdown
from packcast.bench.model import Results
from packcast.errors import DestinationError, UsageError

_FORMATS: dict[str, Callable[[Results], str]] = {
    "--export-json": to_json,
    "--export-csv": to_csv,
    "--export-markdown": to_markdown,
}


@dataclass(frozen=True, slots=True)
class ExportFile:
    """A format and its file; `path` None is standard output."""

    option: str
    path: Path | None


def export_files(given: Mapping[str, str | None]) -> tuple[ExportFile, ...]:
    """The targets by option, `--export-json` and its like; raises UsageError.

    `-` is standard output, once at most. Touches nothing.
    """
    targets: list[ExportFile] = []
    for option, text in given.items():
        if text is None:
            continue
        target = ExportFile(option, None if text == "-" else file_to_export_to(option, text))
        for other in targets:
            if other.path == target.path:
                both = f"{other.option} and {option}"
                raise UsageError(f"{both} would both write {text if target.path else 'to -'}")
        targets.append(target)
    return tuple(targets)


def file_to_export_to(option: str, text: str) -> Path:
    """A file that can be written, as far as can be told without writing it; raises UsageError."""
    if not text:
        raise UsageError(f"{option}: the path is empty")
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.is_dir():
        raise UsageError(f"{option}: {text} is a directory")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: the directory {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option}: {text} may not be written")
    return path


def write_exports(targets: Sequence[ExportFile], results: Results) -> None:
    """Write every file again; standard output only once the bench is over.

    Raises DestinationError after all were tried.
    """
    failed: DestinationError | None = None
    for target in targets:
        if target.path is None:
            if results.exit_code is not None:
                sys.stdout.write(_FORMATS[target.option](results))
                sys.stdout.flush()
            continue
        try:
            write_file(target.path, _FORMATS[target.option](results).encode())
        except OSError as error:
            failed = DestinationError(f"{target.option}: {target.path}: {error.strerror}")
    if failed:
        raise failed


def write_file(path: Path, content: bytes) -> None:
    """The file is the old one or the new one, never a part; a device or a link is written itself.
    Raises OSError."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
