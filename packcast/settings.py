"""The settings of a transfer, and their checks: plain data.

Imports no torch and no command line library. A check's `where` is the user's name of the value:
`--device` on the command line, `device` in a library call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from packcast.errors import UsageError
from packcast.units import MIB, format_exact_size, parse_rate

SinkKind = Literal["write", "verify", "discard"]
Backend = Literal["auto", "nccl", "gloo"]

PLACEHOLDERS = ("{rank}", "{local_rank}", "{host}")
MAX_TOKEN_NBYTES = 4096
SAFE_TOKEN_NBYTES = 16

MIN_FITTING_SIZE, MAX_FITTING_SIZE = 16 * MIB, 64 * MIB  # that are chosen for a checkpoint
DEFAULT_NUM_BUFFERS = 4
DEFAULT_STAGING = 192 * MIB  # more is no faster
DEFAULT_JOIN_TIMEOUT_S = 300.0
DEFAULT_HEARTBEAT_TIMEOUT_S = 3.0
# Some call of a trainer may hold its interpreter for seconds, which is no death.
DEFAULT_LIBRARY_HEARTBEAT_TIMEOUT_S = 30.0
DEFAULT_STALL_TIMEOUT_S = 600.0

_ENOUGH_BUFFERS = 4
_HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?")
_MAX_HOST_NAME_LENGTH = 253
_DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d{1,3}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One transfer, sent or received, on one rank.

    Sizes in bytes, times in seconds. What only the sender decides (buffers, readers, selection)
    is ignored on the others: it reaches them with the offer.
    """

    command: Literal["send", "recv"]
    checkpoint: Path | None = None
    sink: SinkKind = "discard"
    target: str | None = None  # --out or --verify, with {rank}, {local_rank}, {host} still in it
    force: bool = False
    in_place: bool = False  # fill the existing target directory
    sidecars: bool = True
    all_files: bool = False
    follow_links: bool = False  # that lead out of the checkpoint
    exclude_files: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    readers: int | None = 1  # None: all
    max_rate: float | None = None  # bytes per second that the sender lets go
    buffer_size: int | None = None  # None: by the checkpoint's size
    num_buffers: int = DEFAULT_NUM_BUFFERS
    staging: int = DEFAULT_STAGING
    backend: Backend = "auto"
    device: str = "auto"
    workers: int | None = None  # no launcher: how many `recv` will come
    address: tuple[str, int] | None = None  # no launcher: --listen, or recv's HOST:PORT
    port: int | None = None  # Slurm, mpirun: the store's port, instead of the derived one
    port_range: range | None = None  # for each socket on which the sender listens
    token: bytes | None = None
    token_file: Path | None = None  # made for it, to be shown in its place
    rank: int | None = None  # no launcher: recv --rank
    join_timeout_s: float = DEFAULT_JOIN_TIMEOUT_S
    heartbeat_timeout_s: float = DEFAULT_HEARTBEAT_TIMEOUT_S
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S

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


def check_size(where: str, nbytes: int, text: str | None = None) -> int:
    """At least one block of digests, 1 MiB; `text` is the size as it was given."""
    if nbytes < MIB:
        shown = text or format_exact_size(nbytes)
        raise UsageError(f"{where}: {shown} is too small", hint="the minimum is 1MiB")
    return nbytes


def check_seconds(where: str, seconds: float, text: str | None = None) -> float:
    """A time limit: more than nothing; `text` is the duration as it was given."""
    if not seconds > 0:
        shown = text or f"{seconds:g} s"
        raise UsageError(
            f"{where}: must be greater than 0, not {shown}", hint="write durations as 3s or 5min"
        )
    return seconds


def check_rate(where: str, rate: float | str) -> float:
    """Bytes per second, as a number or a text such as `2GB/s`; more than nothing."""
    try:
        bytes_per_second = parse_rate(rate) if isinstance(rate, str) else rate
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None
    if not bytes_per_second > 0:
        raise UsageError(f"{where}: must be greater than 0", hint="write rates as 2GB/s")
    return bytes_per_second


def check_port_range(where: str, first: int, last: int) -> range:
    """The ports from `first` to `last`: a sender listens on two of them at a time."""
    if not 0 < first < last < 65536:
        raise UsageError(
            f"{where}: {first}-{last} is not a range of ports",
            hint="as in 29400-29409: from 1 to 65535, and two for each transfer at a time",
        )
    return range(first, last + 1)


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


def check_token(where: str, token: bytes) -> str | None:
    """Raise UsageError for an unusable token; returns a warning for a short one."""
    if not 1 <= len(token) <= MAX_TOKEN_NBYTES:
        raise UsageError(
            f"{where}: a token must have 1 to {MAX_TOKEN_NBYTES} bytes, not {len(token)}",
            hint="`openssl rand -hex 16` makes one",
        )
    if len(token) < SAFE_TOKEN_NBYTES:
        return (
            f"{where}: a token of fewer than {SAFE_TOKEN_NBYTES} bytes can be guessed;"
            " `openssl rand -hex 16` makes a better one"
        )
    return None


def check_device(where: str, device: str) -> str:
    """Whether the device exists is checked later, on its host."""
    if not _DEVICE.fullmatch(device):
        raise UsageError(
            f"{where}: {device!r} is not one of auto, cpu, cuda, cuda:N",
            hint="N counts from 0",
        )
    return device


def check_template(where: str, text: str) -> str:
    """A path that may hold placeholders; a misspelt one would make every rank write one place."""
    if not text:
        raise UsageError(
            f"{where}: the path is empty", hint="check the shell variable that it comes from"
        )
    for found in re.findall(r"\{[a-z_]*\}", text):
        if found not in PLACEHOLDERS:
            raise UsageError(
                f"{where}: {found} is not a placeholder",
                hint=f"the placeholders are {', '.join(PLACEHOLDERS)}",
            )
    return text


def check_destinations(
    given: Sequence[str], choices: Sequence[str], *, required: bool, hint: str | None = None
) -> None:
    """At most one of the `choices` was `given`, and exactly one where that is `required`."""
    if len(given) > 1 or (required and not given):
        amount = "only one of" if given else "one of"
        options = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise UsageError(f"give {amount} {options}", hint=hint)
