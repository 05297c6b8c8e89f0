"""Where results are exported to: checked before the first run, rewritten after every case.

A file is replaced whole, so that what reads it meanwhile, or is left after a crash, is complete.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packcast.bench.export import to_csv, to_json, to_markdown
from packcast.bench.results import Results
from packcast.errors import DestinationError, UsageError

_FORMATS: dict[str, Callable[[Results], str]] = {
    "--export-json": to_json,
    "--export-csv": to_csv,
    "--export-markdown": to_markdown,
}


@dataclass(frozen=True, slots=True)
class Target:
    """A format and its file; `path` None is standard output."""

    option: str
    path: Path | None


def export_targets(given: Mapping[str, str | None]) -> tuple[Target, ...]:
    """The targets by option, `--export-json` and its like; raises UsageError.

    `-` is standard output, once at most. Touches nothing.
    """
    targets: list[Target] = []
    for option, text in given.items():
        assert option in _FORMATS, option
        if text is None:
            continue
        target = Target(option, None if text == "-" else file_target(option, text))
        for other in targets:
            if other.path == target.path:
                both = f"{other.option} and {option}"
                raise UsageError(f"{both} would both write {text if target.path else 'to -'}")
        targets.append(target)
    return tuple(targets)


def file_target(option: str, text: str) -> Path:
    """A file that can be written, as far as can be told without writing it; raises UsageError."""
    if not text:
        raise UsageError(f"{option}: the path is empty")
    path = Path(os.path.abspath(text))
    if path.is_dir():
        raise UsageError(f"{option}: {text} is a directory")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: the directory {path.parent} does not exist")
    # It is replaced, so it is the directory that must be writable; a device is written itself.
    must_allow = path if _is_special(path) else path.parent
    if not os.access(must_allow, os.W_OK):
        raise UsageError(f"{option}: {text} may not be written")
    return path


def write_targets(targets: tuple[Target, ...], results: Results) -> None:
    """Rewrite every file; standard output only once the results are over.

    Raises DestinationError after all were tried.
    """
    failed: DestinationError | None = None
    for target in targets:
        text = _FORMATS[target.option](results)
        if target.path is None:
            if results.exit_code is not None:
                sys.stdout.write(text)
                sys.stdout.flush()
            continue
        try:
            replace_file(target.path, text.encode())
        except OSError as error:
            failed = DestinationError(f"{target.option}: {target.path}: {error.strerror}")
    if failed:
        raise failed


def replace_file(path: Path, content: bytes) -> None:
    """The file is the old one or the new one, never a part; raises OSError."""
    if _is_special(path):
        path.write_bytes(content)
        return
    # A link stays a link: what it leads to is replaced.
    path = Path(os.path.realpath(path))
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), _mode(path))
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _is_special(path: Path) -> bool:
    """`/dev/null`, a FIFO: nothing to be replaced."""
    return path.exists() and not path.is_file()


def _mode(path: Path) -> int:
    """The old file's; else what `open` would give. mkstemp gives 0600 to everything."""
    with suppress(OSError):
        return path.stat().st_mode & 0o777
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask
