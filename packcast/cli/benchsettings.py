"""What was typed after `packcast bench`, read and checked: the only way into BenchSettings.

And the defaults that depend on the machine: how many ranks, how many bytes, in which directory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import get_args

from packcast.bench import grammar
from packcast.bench.model import BenchSettings, BenchSink, ShapeKind, SourceKind
from packcast.cli import settings as given
from packcast.cli.profile import backend_expected
from packcast.errors import UsageError
from packcast.group.launch import Launch
from packcast.group.launch_checks import check_port
from packcast.io.memory import available_nbytes
from packcast.packed.plan import check_staging
from packcast.settings import Backend
from packcast.units import GIB, MIB, format_exact_size, parse_rate

SIZE_ON_CPUS, SIZE_ON_GPUS = 256 * MIB, 8 * GIB
_SHAPES: tuple[ShapeKind, ...] = get_args(ShapeKind)
_SOURCES: tuple[SourceKind, ...] = get_args(SourceKind)
_SINKS: tuple[BenchSink, ...] = get_args(BenchSink)
# What is done with weights that never were a file.
_RESIDENT_SINKS: tuple[BenchSink, ...] = ("discard", "land")
_MEMORY = Path("/dev/shm")


def what(
    checkpoint: str | None,
    shape: str | None,
    size: str | None,
    source: str,
    sink: str | None,
) -> tuple[tuple[ShapeKind, ...], tuple[SourceKind, ...], tuple[BenchSink, ...]]:
    """Shapes, sources and sinks, if some of them go together."""
    if checkpoint is not None:
        for option, value in (("--shape", shape), ("--size", size)):
            if value is not None:
                raise UsageError(f"{option} is for generated weights, but a CKPT is given")
        shapes: tuple[ShapeKind, ...] = ()
    else:
        shapes = grammar.choices("--shape", shape or "dense", _SHAPES)
    sources = grammar.choices("--source", source, _SOURCES)
    if sink is not None:
        sinks = grammar.choices("--sink", sink, _SINKS)
    elif "file" not in sources:
        sinks = _RESIDENT_SINKS
    else:
        sinks = ("discard", "write", *(("land",) if "resident" in sources else ()))
    if "file" not in sources and not set(sinks) & set(_RESIDENT_SINKS):
        raise UsageError(
            f"--sink {','.join(sinks)} does not go with --source resident",
            hint="resident weights go to discard or land",
        )
    return shapes, sources, sinks


def size_of_weights(text: str | None, backend: str, device: str) -> int:
    """Bytes of generated weights: as typed, else small where there is no GPU."""
    if text is not None:
        return given.size("--size", text)
    on_gpus = backend_expected(backend, device) == "nccl"
    return SIZE_ON_GPUS if on_gpus else SIZE_ON_CPUS


def bench_settings(
    *,
    checkpoint: str | None,
    shape: str | None,
    size: str | None,
    source: str,
    sink: str | None,
    cold: bool,
    directory: str | None,
    write_directory: str | None,
    buffer_size: str,
    num_buffers: str,
    readers: str,
    runs: int,
    warmup: int,
    no_check: bool,
    no_baselines: bool,
    no_limits: bool,
    port: int | None,
    token_file: str | None,
    staging: str,
    backend: Backend,
    device: str,
    join_timeout: str,
    heartbeat_timeout: str,
    stall_timeout: str,
    launch: Launch,
    num_ranks: Callable[[], int],
    environ: Mapping[str, str],
) -> BenchSettings:
    """Everything, checked; raises UsageError. Touches nothing, makes nothing.

    `num_ranks`, those on this host, is asked for only where no directory is given.
    """
    shapes, sources, sinks = what(checkpoint, shape, size, source, sink)
    nbytes = size_of_weights(size, backend, device)
    sizes = grammar.buffer_sizes("--buffer-size", buffer_size)
    pinned = given.size("--staging", staging)
    for one in sizes:
        check_staging(one, pinned)
    check_port(port, launch, given.option)
    readers_of = grammar.readers("--readers", readers)
    counts = grammar.buffer_counts("--num-buffers", num_buffers)
    if directory:
        where = _directory("--dir", directory)
    else:  # last, since counting ranks may mean counting GPUs, which takes torch seconds
        where = default_directory(
            nbytes, write_too="write" in sinks, num_ranks=num_ranks(), cold=cold
        )
    return BenchSettings(
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        shapes=shapes,
        size=nbytes,
        sources=sources,
        sinks=sinks,
        readers=readers_of,
        buffer_sizes=sizes,
        num_buffers=counts,
        runs=runs,
        warmup=warmup,
        directory=where,
        write_directory=_directory("--write-dir", write_directory) if write_directory else where,
        cold=cold,
        check=not no_check,
        baselines=not no_baselines,
        limits=not no_limits,
        staging=pinned,
        backend=backend,
        device=given.device(device),
        port=port,
        token=given.token(token_file, environ),
        **given.limits(join_timeout, heartbeat_timeout, stall_timeout),
    )


def least_rate(text: str) -> float:
    """--min-bandwidth, in bytes per second."""
    return given.parsed("--min-bandwidth", text, parse_rate)


def _directory(option: str, text: str) -> Path:
    path = Path(os.path.abspath(text))
    if not path.is_dir():
        raise UsageError(f"{option}: {text} is not a directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: {text} may not be written")
    return path


def default_directory(nbytes: int, *, write_too: bool, num_ranks: int, cold: bool) -> Path:
    """Memory, where it has room for the weights and a copy per worker; else the disk.

    tmpfs has no page cache beneath it that could be cold.
    """
    # The original's baseline writes its own copies in turn, never beside ours.
    needed = nbytes * (max(num_ranks, 2) if write_too else 1)
    if not cold and _free_memory_for_files() > 1.25 * needed and os.access(_MEMORY, os.W_OK):
        return _MEMORY
    return Path(tempfile.gettempdir())


def _free_memory_for_files() -> int:
    """Of /dev/shm: what it may still hold, and half of what the machine could give it."""
    try:
        state = os.statvfs(_MEMORY)
        available = available_nbytes() or 0
    except OSError:
        return 0
    return min(state.f_bavail * state.f_frsize, available // 2)


def pin_defaults(settings: BenchSettings, environ: MutableMapping[str, str]) -> None:
    """For ranks that this process starts: what one of them would decide, another must not."""
    environ["PACKCAST_DIR"] = str(settings.directory)
    if settings.checkpoint is None:
        environ["PACKCAST_SIZE"] = format_exact_size(settings.size)


def default_nproc(backend: str, device: str) -> int:
    """A rank for each GPU of this machine, two where there are not two GPUs to use."""
    if backend == "gloo" or device == "cpu":
        return 2
    from packcast.group.devices import visible_gpus

    return max(2, len(visible_gpus()))
