"""Parses the options of `packcast bench` that are lists, and its defaults for this machine."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TypeVar, get_args

from packcast.bench.model import BenchSettings, BenchSink, ShapeKind, SourceKind
from packcast.cli import parsing
from packcast.errors import UsageError
from packcast.io.memory import available_nbytes
from packcast.launch.devices import has_gpu_driver
from packcast.packed.plan import BLOCK, check_buffers
from packcast.settings import Backend, check_readers, check_size, named
from packcast.units import GIB, MIB, format_exact_size, parse_size

T = TypeVar("T")

SIZE_ON_CPUS, SIZE_ON_GPUS = 256 * MIB, 8 * GIB
MAX_SIZE = 4096 * GIB
MAX_POINTS = 256  # in one list; more is probably a mistyped step
SHAPES: tuple[ShapeKind, ...] = get_args(ShapeKind)
SOURCES: tuple[SourceKind, ...] = get_args(SourceKind)
SINKS: tuple[BenchSink, ...] = get_args(BenchSink)
_RESIDENT_SINKS: tuple[BenchSink, ...] = ("discard", "land")
_PLOT_SUFFIXES = (".png", ".svg")
_MEMORY = Path("/dev/shm")
_RANGE = re.compile(r"(.+?)\.\.([^:]+):(?:x([0-9]{1,6})|\+(.+))")


def choices(option: str, text: str, allowed: Sequence[T]) -> tuple[T, ...]:
    """A list of known words, as `file,resident`. Raises UsageError."""
    known = {str(word): word for word in allowed}
    for part in _parts(option, text):
        if part not in known:
            raise UsageError(f"{option}: {part!r} is not one of {', '.join(known)}")
    return _distinct(known[part] for part in _parts(option, text))


def buffer_sizes(option: str, text: str) -> tuple[int, ...]:
    """`16MiB,64MiB`, `16MiB..1GiB:x4`, `16MiB..64MiB:+16MiB`, or a mix; in bytes.

    Raises UsageError.
    """
    return _points(option, text, parse_size, lambda nbytes: check_buffers(nbytes, 1))


def buffer_counts(option: str, text: str) -> tuple[int, ...]:
    """`1,2,4`, `1..8:x2`, `2..8:+2`, or a mix. Raises UsageError."""
    return _points(option, text, _count, lambda count: check_buffers(BLOCK, count))


def readers(text: str) -> tuple[int | None, ...]:
    """`1,2,all`; `all` is None. Raises UsageError."""
    return _distinct(named("--readers", check_readers, part) for part in _parts("--readers", text))


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise UsageError(f"{text!r} is not a count")
    return int(text)


def _points(
    option: str, text: str, parse: Callable[[str], int], check: Callable[[int], object]
) -> tuple[int, ...]:
    def checked(value: int) -> int:
        try:
            check(value)
        except UsageError as error:
            raise UsageError(f"{option}: {error.message}") from None
        return value

    def number(word: str) -> int:
        return named(option, parse, word.strip())

    points: list[int] = []
    for part in _parts(option, text):
        match = _RANGE.fullmatch(part)
        if ".." in part and not match:
            raise UsageError(
                f"{option}: {part!r} is not a range",
                hint=f"as in {option} FIRST..LAST:x2 or FIRST..LAST:+STEP",
            )
        if not match:
            points.append(checked(number(part)))
            continue
        value, last = checked(number(match[1])), checked(number(match[2]))
        factor, step = int(match[3] or 1), number(match[4]) if match[4] else 0
        if last < value or value * factor + step <= value:
            raise UsageError(f"{option}: {part!r} must go from a smaller to a larger value")
        while value <= last and len(points) <= MAX_POINTS:
            points.append(checked(value))
            value = value * factor + step
    if len(points) > MAX_POINTS:
        raise UsageError(
            f"{option}: {text!r} makes too many values", hint=f"the maximum is {MAX_POINTS}"
        )
    return _distinct(points)


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{option}: {text!r} has an empty part", hint="write lists as a,b,c")
    return parts


def _distinct(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def default_sinks(sources: Sequence[SourceKind]) -> tuple[BenchSink, ...]:
    """The sinks without `--sink`."""
    if "file" not in sources:
        return _RESIDENT_SINKS
    return ("discard", "write", "land") if "resident" in sources else ("discard", "write")


def check_what(settings: BenchSettings, *, shape: str | None, size: str | None) -> None:
    """Raise UsageError for options that exclude each other."""
    for option, value in (("--shape", shape), ("--size", size)):
        if settings.checkpoint is not None and value is not None:
            raise UsageError(
                f"{option} is for generated weights, but a CKPT is given",
                hint="leave out one of the two",
            )
    if "file" not in settings.sources and not set(settings.sinks) & set(_RESIDENT_SINKS):
        raise UsageError(
            f"--sink {','.join(settings.sinks)} does not go with --source resident",
            hint="resident weights go to discard or land",
        )


def size_of_weights(text: str | None, backend: Backend, device: str) -> int:
    """Bytes of generated weights; without `--size` fewer where there is no GPU."""
    if text is not None:
        nbytes = named("--size", check_size, text)
        if nbytes > MAX_SIZE:
            raise UsageError(f"--size: {text} is more than {format_exact_size(MAX_SIZE)}")
        return nbytes
    on_gpus = backend == "nccl" or (backend == "auto" and device != "cpu" and has_gpu_driver())
    return SIZE_ON_GPUS if on_gpus else SIZE_ON_CPUS


def directory(option: str, text: str) -> Path:
    """A directory that is writable."""
    path = _absolute(parsing.path(text))
    if not path.is_dir():
        raise UsageError(f"{option}: {text} is not a directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: {text} is not writable")
    return path


def exports(options: Mapping[str, str | None]) -> dict[str, Path | None]:
    """The files of `--export-json` and the others; None is standard output, for one of them."""
    found: dict[str, Path | None] = {}
    for option, text in options.items():
        if text is None:
            continue
        path = None if text == "-" else _absolute(parsing.writable(option, text))
        for other, same in found.items():
            if same == path:
                target = text if path else "to -"
                raise UsageError(f"{other} and {option} would both write {target}")
        found[option] = path
    return found


def plot(option: str, text: str) -> Path:
    """The file to draw into. Imports matplotlib."""
    path = _absolute(parsing.writable(option, text))
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise UsageError(f"{option}: {text} must end in {' or '.join(_PLOT_SUFFIXES)}")
    try:
        # Now, not at the end: after a signal only a few seconds are left to draw.
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UsageError(
            f"{option} needs matplotlib: {error}", hint="pip install 'packcast[plot]'"
        ) from error
    return path


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def default_directory(nbytes: int, *, write_too: bool, num_ranks: int, cold: bool) -> Path:
    """/dev/shm if it has room for the weights and a copy for each worker; else the disk.

    Files on tmpfs cannot be cold.
    """
    needed = nbytes * (max(num_ranks, 2) if write_too else 1)
    if not cold and _free_memory_for_files() > 1.25 * needed and os.access(_MEMORY, os.W_OK):
        return _MEMORY
    return Path(tempfile.gettempdir())


def _free_memory_for_files() -> int:
    """What /dev/shm has free, but at most half of the machine's available memory."""
    try:
        state = os.statvfs(_MEMORY)
    except OSError:
        return 0
    return min(state.f_bavail * state.f_frsize, (available_nbytes() or 0) // 2)


def pin_defaults(settings: BenchSettings, environ: MutableMapping[str, str]) -> None:
    """Give the ranks that this process starts the defaults that they might choose differently."""
    environ["PACKCAST_DIR"] = str(settings.directory)
    if settings.checkpoint is None:
        environ["PACKCAST_SIZE"] = format_exact_size(settings.size)


def default_nproc(backend: Backend, device: str) -> int:
    """One rank for each GPU of this machine, at least two."""
    if backend == "gloo" or device == "cpu":
        return 2
    from packcast.launch.devices import visible_gpus

    return max(2, len(visible_gpus()))
