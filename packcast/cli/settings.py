"""What was typed on the command line, read and checked: the only way into `packcast.settings`.

Every complaint is a UsageError that names the option. Knows no torch, and does nothing yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

from packcast.errors import UsageError
from packcast.group.launch import Launch
from packcast.packed.plan import check_buffers, check_staging
from packcast.settings import Settings, SinkKind
from packcast.units import MIB, parse_duration, parse_size

T = TypeVar("T")

PLACEHOLDERS = ("{rank}", "{local_rank}", "{host}")
_DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d{1,3}")
_MAX_TOKEN_NBYTES = 4096

WAYS_TO_LAUNCH = """ways to start the workers:
    here, three ranks   packcast send CKPT --out 'DIR-{rank}' --nproc 3
    on other hosts      packcast send CKPT --workers 3 --listen HOST:29400
    under torchrun      torchrun --nproc-per-node 4 -m packcast send CKPT --out 'DIR-{rank}'
    under Slurm         srun packcast send CKPT --out DIR"""


def _read(option: str, text: str, reader: Callable[[str], T]) -> T:
    try:
        return reader(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error.message}", hint=error.hint) from None


def size(option: str, text: str) -> int:
    """Bytes; at least one block of digests, 1 MiB."""
    nbytes = _read(option, text, parse_size)
    if nbytes < MIB:
        raise UsageError(f"{option}: {text} is too small", hint="the least is 1MiB")
    return nbytes


def seconds(option: str, text: str) -> float:
    """A time limit; more than nothing."""
    value = _read(option, text, parse_duration)
    if value <= 0:
        raise UsageError(f"{option}: a limit of {text} is over before it begins")
    return value


class Buffers(TypedDict):
    """Fields of Settings, in bytes."""

    buffer_size: int
    num_buffers: int
    staging: int


class Limits(TypedDict):
    """Fields of Settings, in seconds."""

    join_timeout_s: float
    heartbeat_timeout_s: float
    stall_timeout_s: float


def buffers(buffer_size: str, num_buffers: int, staging: str) -> Buffers:
    """The ring and the staging, if such a ring can be built."""
    nbytes, pinned = size("--buffer-size", buffer_size), size("--staging", staging)
    check_buffers(nbytes, num_buffers)
    check_staging(nbytes, pinned)
    return Buffers(buffer_size=nbytes, num_buffers=num_buffers, staging=pinned)


def limits(join: str, heartbeat: str, stall: str) -> Limits:
    """The three time limits."""
    return Limits(
        join_timeout_s=seconds("--join-timeout", join),
        heartbeat_timeout_s=seconds("--heartbeat-timeout", heartbeat),
        stall_timeout_s=seconds("--stall-timeout", stall),
    )


def readers(text: str) -> int | None:
    """`all` is None."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--readers: {text!r} is neither a count nor `all`")
    return int(text)


def device(text: str) -> str:
    """Whether it is there is found out later, on the device's host."""
    if not _DEVICE.fullmatch(text):
        raise UsageError(f"--device: {text!r} is none of auto, cpu, cuda, cuda:N")
    return text


def address(option: str, text: str) -> tuple[str, int]:
    """`host:29400`, `10.0.0.1:29400`, `[::1]:29400`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not host or not colon or (":" in host and not bracketed):
        raise UsageError(f"{option}: {text!r} is not HOST:PORT", hint="as in node1:29400")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{option}: {port!r} is not a port")
    return host, int(port)


def template(option: str, text: str) -> str:
    """A path that may hold placeholders; a misspelt one would make every rank write one place."""
    if not text:
        raise UsageError(f"{option}: the path is empty")
    for found in re.findall(r"\{[a-z_]*\}", text):
        if found not in PLACEHOLDERS:
            raise UsageError(
                f"{option}: {found} is not filled in", hint=f"there are {', '.join(PLACEHOLDERS)}"
            )
    return text


def destination(
    out: str | None, verify: str | None, *, discard: bool = False, required: bool = False
) -> tuple[SinkKind, str | None]:
    """At most one of the three, exactly one where `required`; without any the bytes are dropped."""
    given = (out is not None) + (verify is not None) + discard
    if given > 1 or (required and not given):
        options = "--out, --verify or --discard" if required else "--out or --verify"
        amount = "only one of" if given > 1 else "one of"
        raise UsageError(f"give {amount} {options}", hint="see --help for what each does")
    if out is not None:
        return "write", template("--out", out)
    if verify is not None:
        return "verify", template("--verify", verify)
    return "discard", None


def token(file: str | None, environ: Mapping[str, str]) -> bytes | None:
    """The shared secret: of --token-file, else of PACKCAST_TOKEN, else none."""
    if file is None:
        return environ.get("PACKCAST_TOKEN", "").encode() or None
    try:
        with open(file, "rb") as stream:
            secret = stream.read(_MAX_TOKEN_NBYTES + 1).strip()
    except OSError as error:
        raise UsageError(f"--token-file: {file}: {error.strerror}") from None
    if not secret:
        raise UsageError(f"--token-file: {file} is empty")
    if len(secret) > _MAX_TOKEN_NBYTES:
        raise UsageError(f"--token-file: {file} is longer than {_MAX_TOKEN_NBYTES} bytes")
    return secret


def json_target(text: str | None) -> str | None:
    """Where the result goes; checked now, not when the transfer is over."""
    if text is None or text == "-":
        return text
    path = Path(template("--json", text))
    if path.is_dir():
        raise UsageError(f"--json: {text} is a directory")
    if not any(name in str(path.parent) for name in PLACEHOLDERS):
        if not path.parent.is_dir():
            raise UsageError(f"--json: the directory {path.parent} does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"--json: {text} may not be written")
    return text


def check_send(settings: Settings, launch: Launch, *, nproc: int | None) -> None:
    """Who takes part in `send` must be said once, by a launcher or by an option."""
    launched = launch.kind != "none"
    if launched:
        for option, value in (("--workers", settings.workers), ("--nproc", nproc)):
            if value is not None:
                raise UsageError(
                    f"{option} is for use without a launcher; this process was started by "
                    f"{launch.kind}, which says how many ranks there are"
                )
    if nproc is not None and settings.workers is not None:
        raise UsageError("--nproc starts the workers itself; --workers waits for others")
    if settings.workers is not None and settings.address is None:
        raise UsageError(
            "--workers needs --listen HOST:PORT", hint="HOST is a name of this host that they reach"
        )
    if settings.address is not None and settings.workers is None:
        raise UsageError("--listen needs --workers N: how many `packcast recv` will come")
    if not launched and nproc is None and settings.workers is None:
        raise UsageError("there is nobody to send to", hint=WAYS_TO_LAUNCH)
    _check_port(settings, launch)


def check_recv(settings: Settings, launch: Launch, *, json: str | None) -> None:
    """Without a launcher `recv` must be told where the sender is; with one it must not."""
    launched = launch.kind != "none"
    if launched and json is not None and "{rank}" not in json:
        raise UsageError(
            "--json: the ranks would all write one file", hint="put {rank} in its name"
        )
    if launched and settings.address is not None:
        raise UsageError(
            f"HOST:PORT is for use without a launcher; this process was started by {launch.kind}"
        )
    if launched and settings.rank is not None:
        raise UsageError(f"--rank is for use without a launcher; {launch.kind} gives out ranks")
    if not launched and settings.address is None:
        raise UsageError(
            "where is the sender? no HOST:PORT was given, and there is no launcher",
            hint="`packcast send --workers N --listen HOST:PORT` prints the line to run",
        )
    if settings.address is not None and settings.address[1] == 0:
        raise UsageError("port 0 is not a place to connect to")
    _check_port(settings, launch)


def _check_port(settings: Settings, launch: Launch) -> None:
    if settings.port is not None and launch.kind != "slurm":
        raise UsageError(
            "--port is for Slurm",
            hint="torchrun has --master-port; without a launcher use --listen",
        )


def without_nproc(argv: list[str]) -> list[str]:
    """The same command line for one of the ranks that --nproc starts."""
    kept: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--":
            return [*kept, word, *rest]
        if word == "--nproc":
            next(rest, None)
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept
