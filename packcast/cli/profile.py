"""What a bench found best on this machine, kept for `send`: one entry per backend, in a JSON file.

A profile is advice: one that is damaged or does not fit costs a warning, never the transfer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packcast.bench.rows import Row
from packcast.bench.targets import replace_file
from packcast.cli.settings import Buffers
from packcast.errors import DestinationError, UsageError
from packcast.group.devices import has_gpu_driver
from packcast.packed.plan import check_ring
from packcast.units import format_exact_size

SCHEMA = 1
_MAX_NBYTES = 1 << 20
# What `send` is mostly used for comes first: a point that is best for dropping bytes may be far
# from best for writing them.
_SINKS = ("write", "verify", "land", "discard")


@dataclass(frozen=True, slots=True)
class Profile:
    """The best point for one backend: size in bytes. `readers` is for people to read."""

    buffer_size: int
    num_buffers: int
    readers: int


def profile_path(given: str | None, environ: Mapping[str, str]) -> Path:
    """Where profiles are: as given, else as the XDG base directories say."""
    if given:
        return Path(given)
    home = environ.get("XDG_CONFIG_HOME", "")
    # The specification: a relative path is invalid, and to be ignored.
    base = Path(home) if os.path.isabs(home) else Path.home() / ".config"
    return base / "packcast" / "profile.json"


def choose(rows: Iterable[Row]) -> Row | None:
    """The best row that says something about `send`: from a file, by what is done with it."""
    able = [row for row in rows if row.is_best and row.case.source == "file"]
    return min(able, key=lambda row: _SINKS.index(row.case.sink), default=None)


def save_profile(path: Path, backend: str, row: Row) -> None:
    """Add or replace the backend's entry; raises DestinationError.

    Entries of other backends stay, unless the file is damaged.
    """
    case = row.case
    entries: dict[str, object] = {}
    with suppress(OSError, ValueError):  # there is none, or none worth keeping
        entries = _entries(path)
    entries[backend] = {
        "buffer_size": case.buffer_size,
        "num_buffers": case.num_buffers,
        "readers": case.readers,
        "shape": case.shape,
        "sink": case.sink,
        "bytes_per_second": row.bytes_per_second,
    }
    text = json.dumps({"schema": SCHEMA, "profiles": entries}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise DestinationError(f"--save-profile: {path}: {error.strerror}") from error


def load_profile(path: Path, backend: str) -> Profile | None:
    """The backend's entry, None where there is none; raises OSError, or ValueError if damaged."""
    entry = _entries(path).get(backend)
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ValueError(f"{backend} is no object")
    size, count = _number(entry, "buffer_size"), _number(entry, "num_buffers")
    return Profile(size, count, _number(entry, "readers"))


def profiled(
    ring: Buffers,
    given: str | None,
    backend: str,
    device: str,
    environ: Mapping[str, str],
    say: Callable[[str], None] | None,
) -> Buffers:
    """The buffers as the profile has them, or unchanged; `say` tells a person about it."""
    path = profile_path(given, environ)
    try:
        found = load_profile(path, backend_expected(backend, device))
        if found is None:
            return ring
        check_ring(found.buffer_size, found.num_buffers, ring["staging"])
    except FileNotFoundError:
        if given and say:
            say(f"packcast: warning: --profile: {path} does not exist; the defaults are used")
        return ring
    except (OSError, ValueError, UsageError) as error:
        if say:
            why = error.strerror if isinstance(error, OSError) else error
            say(f"packcast: warning: the profile {path} is not used: {why}")
        return ring
    if say:
        size = format_exact_size(found.buffer_size)
        say(f"using --buffer-size {size} --num-buffers {found.num_buffers} from profile {path}")
    return Buffers(
        buffer_size=found.buffer_size, num_buffers=found.num_buffers, staging=ring["staging"]
    )


def backend_expected(backend: str, device: str) -> str:
    """What `auto` will most likely be, told before anyone has joined and without torch."""
    if backend != "auto":
        return backend
    return "nccl" if device != "cpu" and has_gpu_driver() else "gloo"


def _entries(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        content = file.read(_MAX_NBYTES + 1)
    if len(content) > _MAX_NBYTES:
        raise ValueError("it is larger than 1 MiB")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"it has no schema {SCHEMA}")
    entries = document.get("profiles")
    if not isinstance(entries, dict):
        raise ValueError("it has no profiles")
    return entries


def _number(entry: Mapping[str, object], name: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"its {name} is {value!r}")
    return value
