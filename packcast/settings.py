"""The settings of a transfer: their defaults, and the check of each value, once for everybody.

Imports no torch and no command line library. A check raises UsageError without a name:
`launch.validation` puts `--device` before it on the command line, `device` in a library call.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from packcast.errors import UsageError
from packcast.units import MIB, format_exact_size, parse_duration, parse_rate, parse_size

T = TypeVar("T")
V = TypeVar("V")
SinkKind = Literal["write", "verify", "discard"]
Backend = Literal["auto", "nccl", "gloo"]
Command = Literal["send", "recv"]

PLACEHOLDERS = ("{rank}", "{local_rank}", "{host}")
MAX_TOKEN_NBYTES = 4096
SAFE_TOKEN_NBYTES = 16

MIN_FITTING_SIZE, MAX_FITTING_SIZE = 16 * MIB, 64 * MIB  # that are chosen for a checkpoint
DEFAULT_NUM_BUFFERS = 4
# Six units. What two ranks stage has to fit into the processor's cache: 21.7 GB/s from files to
# files, where eleven units each reach 18.4.
DEFAULT_STAGING = 100 * MIB
DEFAULT_JOIN_TIMEOUT_S = 300.0
DEFAULT_HEARTBEAT_TIMEOUT_S = 3.0
# Some call of a trainer may hold its interpreter for seconds, which is no death.
DEFAULT_LIBRARY_HEARTBEAT_TIMEOUT_S = 30.0
DEFAULT_STALL_TIMEOUT_S = 600.0

_ENOUGH_BUFFERS = 4
_HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?")
_MAX_HOST_NAME_LENGTH = 253
_MAX_PORT = 65535
_DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d{1,3}")


def named(name: str, check: Callable[[V], T], value: V) -> T:
    """`check(value)`; a UsageError gets the name by which the user knows the value."""
    try:
        return check(value)
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", hint=error.hint) from None


# -- the checks ------------------------------------------------------------------------------------


def check_size(given: int | str) -> int:
    """A size in bytes or as `64MiB`: at least one block of digests, 1 MiB."""
    nbytes = parse_size(given) if isinstance(given, str) else given
    if isinstance(nbytes, int | float) and nbytes < MIB:
        shown = given if isinstance(given, str) else format_exact_size(int(nbytes))
        raise UsageError(f"{shown} is too small", hint="the minimum is 1MiB")
    return nbytes


def check_seconds(given: float | str) -> float:
    """A time limit in seconds or as `5min`: more than nothing."""
    seconds = parse_duration(given) if isinstance(given, str) else given
    if isinstance(seconds, int | float) and not seconds > 0:
        raise UsageError(
            f"must be greater than 0, not {seconds:g} s", hint="write durations as 3s or 5min"
        )
    return seconds


def check_rate(given: float | str) -> float:
    """Bytes per second, as a number or as `2GB/s`: more than nothing."""
    rate = parse_rate(given) if isinstance(given, str) else given
    if isinstance(rate, int | float) and not rate > 0:
        raise UsageError("must be greater than 0", hint="write rates as 2GB/s")
    return rate


def check_readers(given: object) -> int | None:
    """How many; None for `all`."""
    if given is None or given == "all":
        return None
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if not isinstance(given, int) or given < 1:
        raise UsageError(
            f"must be a whole number of at least 1, or `all`, not {given!r}",
            hint="the default is 1, the sender",
        )
    return given


def check_device(device: object) -> object:
    """Whether the device exists is checked later, on its host."""
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise UsageError(
            f"{device!r} is not one of auto, cpu, cuda, cuda:N", hint="N counts from 0"
        )
    return device


def check_address(address: object) -> tuple[str, int]:
    """A host and a port; the resolver knows whether there is such a host."""
    match address:
        case (str(host), int(port)):
            pass
        case _:
            raise UsageError(f"{address!r} is not (host, port)", hint="as ('node1', 29400)")
    if not is_host(host):
        raise UsageError(
            f"{host!r} names no host: it is not a host name or address",
            hint="for example node1, 10.0.0.1 or ::1",
        )
    if not 0 <= port <= _MAX_PORT:
        raise UsageError(f"{port} is not a port", hint=f"a port is at most {_MAX_PORT}")
    return host, port


def check_address_to_reach(address: object) -> tuple[str, int]:
    """The same of a process that listens already: not port 0, by which a listener takes any."""
    host, port = check_address(address)
    if port == 0:
        raise UsageError(
            "port 0 cannot be connected to",
            hint="give the port that `send` shows, as in node1:29400",
        )
    return host, port


def check_port_range(ports: object) -> range:
    """The first and the last port: a sender listens on two of them at a time."""
    match ports:
        case (int(first), int(last)):
            pass
        case _:
            raise UsageError(f"{ports!r} is not (first, last)", hint="as (29400, 29409)")
    if not 0 < first < last <= _MAX_PORT:
        raise UsageError(
            f"{first}-{last} is not a range of ports",
            hint="as in 29400-29409: from 1 to 65535, and two for each transfer at a time",
        )
    return range(first, last + 1)


def check_globs(globs: object) -> object:
    """A list; one text would be a glob for each of its letters."""
    if isinstance(globs, str):
        raise UsageError("give a list of globs, not one text")
    return globs


def check_path(text: str) -> str:
    """Not the current directory, for which an empty text would stand."""
    if not text:
        raise UsageError("the path is empty", hint="check the shell variable that it comes from")
    return text


def check_template(text: str) -> str:
    """A path that may hold placeholders; a misspelt one would make every rank write one place."""
    check_path(text)
    for found in re.findall(r"\{[a-z_]*\}", text):
        if found not in PLACEHOLDERS:
            raise UsageError(
                f"{found} is not a placeholder",
                hint=f"the placeholders are {', '.join(PLACEHOLDERS)}",
            )
    return text


def check_token(token: bytes) -> bytes:
    """The secret that all ranks share; whether a short one is safe is the caller's question."""
    if not 1 <= len(token) <= MAX_TOKEN_NBYTES:
        raise UsageError(
            f"a token must have 1 to {MAX_TOKEN_NBYTES} bytes, not {len(token)}",
            hint="`openssl rand -hex 16` makes one",
        )
    return token


def is_host(text: str) -> bool:
    """Whether it could be a host's name or address; the resolver knows whether it is one."""
    try:
        ip_address(text)
    except ValueError:
        pass
    else:
        return True
    try:
        text.encode("idna")  # which has limits of its own for each label
    except UnicodeError:
        return False
    return _HOST_NAME.fullmatch(text) is not None and len(text) <= _MAX_HOST_NAME_LENGTH


# -- the settings ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Check:
    """A check as pydantic runs it, before its own of the type. This module does not import
    pydantic, since the defaults are needed for --help."""

    check: Callable[..., object]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.check, handler(source))


@dataclass(frozen=True, slots=True)
class _Between:
    """The bounds of a number, which pydantic checks."""

    least: int
    most: int = sys.maxsize

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(source) | {"ge": self.least, "le": self.most}


_Size = Annotated[int, _Check(check_size)]
_Seconds = Annotated[float, _Check(check_seconds)]
_Globs = Annotated[tuple[str, ...], _Check(check_globs)]
_Count = Annotated[int, _Between(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One transfer, sent or received, on one rank. `launch.validation` makes them of arguments.

    Sizes in bytes, times in seconds. What only the sender decides (buffers, readers, selection)
    is ignored on the others: it reaches them with the offer.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "arbitrary_types_allowed": True}

    command: Command
    checkpoint: Path | None = None
    sink: SinkKind = "discard"
    target: str | None = None  # --out or --verify, with {rank}, {local_rank}, {host} still in it
    force: bool = False
    in_place: bool = False  # fill the existing target directory
    sidecars: bool = True
    all_files: bool = False
    follow_links: bool = False  # that lead out of the checkpoint
    exclude_files: _Globs = ()
    include: _Globs = ()
    exclude: _Globs = ()
    readers: Annotated[int | None, _Check(check_readers)] = 1  # None: all
    max_rate: Annotated[float, _Check(check_rate)] | None = None  # bytes per second that are sent
    buffer_size: _Size | None = None  # None: by the checkpoint's size
    num_buffers: int = DEFAULT_NUM_BUFFERS
    staging: _Size = DEFAULT_STAGING
    backend: Backend = "auto"
    device: Annotated[str, _Check(check_device)] = "auto"
    workers: _Count | None = None  # no launcher: how many `recv` will come
    # No launcher: --listen, or recv's HOST:PORT.
    address: Annotated[tuple[str, int], _Check(check_address)] | None = None
    # Slurm, mpirun: the store's port, instead of the derived one.
    port: Annotated[int, _Between(1, _MAX_PORT)] | None = None
    # For each socket on which the sender listens.
    port_range: Annotated[range, _Check(check_port_range)] | None = None
    token: bytes | None = None
    token_file: Path | None = None  # made for it, to be shown in its place
    rank: _Count | None = None  # no launcher: recv --rank
    join_timeout_s: _Seconds = DEFAULT_JOIN_TIMEOUT_S
    heartbeat_timeout_s: _Seconds = DEFAULT_HEARTBEAT_TIMEOUT_S
    stall_timeout_s: _Seconds = DEFAULT_STALL_TIMEOUT_S

    @property
    def by_address(self) -> bool:
        """Whether the settings choose the ranks, rather than a launcher."""
        return self.workers is not None or self.address is not None


def fitting_buffer_size(nbytes: int) -> int:
    """The default buffer size for a checkpoint of `nbytes`, in bytes.

    Large buffers cost less per byte; but several are needed to keep all stages busy.
    """
    size = MIN_FITTING_SIZE
    while size < MAX_FITTING_SIZE and size * _ENOUGH_BUFFERS < nbytes:
        size *= 2
    return size


def fill_in(template: str, *, rank: int, local_rank: int, host: str) -> str:
    """`{rank}`, `{local_rank}` and `{host}` in a path, once they are known."""
    for name, value in (("rank", rank), ("local_rank", local_rank), ("host", host)):
        template = template.replace("{" + name + "}", str(value).replace(os.sep, "_"))
    return template
