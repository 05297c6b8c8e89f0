"""Parses and checks the values of options: from text to the fields of `packcast.settings`.

Every error is a UsageError that names the option. Imports no torch; has no side effects.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

from packcast.errors import UsageError
from packcast.launch import validation
from packcast.launch.launchers import Launch
from packcast.packed.plan import check_ring
from packcast.settings import (
    MAX_TOKEN_NBYTES,
    PLACEHOLDERS,
    Settings,
    SinkKind,
    check_destinations,
    check_device,
    check_port_range,
    check_rate,
    check_seconds,
    check_size,
    check_template,
    check_token,
    is_host,
)
from packcast.units import parse_duration, parse_size

T = TypeVar("T")

_ADDRESS = "for example node1:29400, or [::1]:29400"
_WORKERS_OWN = ("out", "verify", "force", "in_place", "manifest", "report")

_WRITABLE = "check the permissions, or choose another file"
LISTENING_SENDER = "`packcast send --workers N --listen HOST:PORT` prints the line to run"


def parsed(option: str, text: str, parse: Callable[[str], T]) -> T:
    """`parse(text)`; a UsageError gets the name of the option."""
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error.message}", hint=error.hint) from None


def option(name: str) -> str:
    """The option of a setting."""
    return "HOST:PORT" if name == "address" else f"--{name.replace('_', '-')}"


def path(text: str) -> Path:
    """A path, with `~` expanded, which no shell does in `--out=~/x` or in quotes."""
    return Path(text).expanduser() if text.startswith("~") else Path(text)


def size(option: str, text: str) -> int:
    """Bytes; at least one block of digests, 1 MiB."""
    return check_size(option, parsed(option, text, parse_size), text)


def seconds(option: str, text: str) -> float:
    """A time limit; more than nothing."""
    return check_seconds(option, parsed(option, text, parse_duration), text)


class BufferOptions(TypedDict):
    """Fields of Settings, in bytes."""

    buffer_size: int | None
    num_buffers: int
    staging: int


class TimeLimits(TypedDict):
    """Fields of Settings, in seconds."""

    join_timeout_s: float
    heartbeat_timeout_s: float
    stall_timeout_s: float


def buffers(buffer_size: str | None, num_buffers: int, staging: str) -> BufferOptions:
    """The sizes of ring and staging; raises UsageError if no such ring can be built."""
    nbytes = None if buffer_size is None else size("--buffer-size", buffer_size)
    pinned = size("--staging", staging)
    check_ring(nbytes, num_buffers, pinned)
    return BufferOptions(buffer_size=nbytes, num_buffers=num_buffers, staging=pinned)


def limits(join: str, heartbeat: str, stall: str) -> TimeLimits:
    """The three time limits."""
    return TimeLimits(
        join_timeout_s=seconds("--join-timeout", join),
        heartbeat_timeout_s=seconds("--heartbeat-timeout", heartbeat),
        stall_timeout_s=seconds("--stall-timeout", stall),
    )


def max_rate(text: str | None) -> float | None:
    """In bytes per second."""
    return None if text is None else check_rate("--max-rate", text)


def readers(text: str) -> int | None:
    """`all` is None."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"--readers: must be a whole number of at least 1, or `all`, not {text!r}",
            hint="the default is 1, the sender",
        )
    return int(text)


def device(text: str) -> str:
    """Whether the device exists is checked later, on its host."""
    return check_device("--device", text)


def address(option: str, text: str) -> tuple[str, int]:
    """`host:29400`, `10.0.0.1:29400`, `[::1]:29400`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not host or not colon or (":" in host) != bracketed:
        raise UsageError(f"{option}: {text!r} is not HOST:PORT", hint=_ADDRESS)
    if not is_host(host):
        raise UsageError(f"{option}: {host!r} is not a host name or address", hint=_ADDRESS)
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{option}: {port!r} is not a port", hint="a port is at most 65535")
    return host, int(port)


def address_to_reach(option: str, text: str) -> tuple[str, int]:
    """The same, but of a process that listens already: with a port."""
    host, port = address(option, text)
    if port == 0:
        raise UsageError(f"{option}: port 0 cannot be connected to", hint=_ADDRESS)
    return host, port


def port_range(text: str | None) -> range | None:
    """`29400-29409`, both included."""
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not dash or not first.isdecimal() or not last.isdecimal():
        raise UsageError(f"--port-range: {text!r} is not A-B", hint="as in 29400-29409")
    return check_port_range("--port-range", int(first), int(last))


def destination(
    out: str | None, verify: str | None, *, discard: bool = False, required: bool = False
) -> tuple[SinkKind, str | None]:
    """At most one of the three, exactly one where `required`; without any the bytes are dropped."""
    asked = {"--out": out is not None, "--verify": verify is not None, "--discard": discard}
    given = [name for name, is_given in asked.items() if is_given]
    choices = list(asked) if required else ["--out", "--verify"]
    check_destinations(given, choices, required=required, hint="--help describes each")
    if out is not None:
        return "write", str(path(check_template("--out", out)))
    if verify is not None:
        return "verify", str(path(check_template("--verify", verify)))
    return "discard", None


def in_place(wanted: bool, sink: SinkKind) -> bool:
    """--in-place needs a sink that writes."""
    if wanted and sink != "write":
        raise UsageError("--in-place needs --out", hint="it keeps the directory --out DIR")
    return wanted


def token(
    file: str | None,
    environ: Mapping[str, str],
    warn: Callable[[str], None] = lambda _text: None,
) -> bytes | None:
    """The shared secret: of --token-file, else of PACKCAST_TOKEN, else none."""
    where = "PACKCAST_TOKEN" if file is None else f"--token-file: {file}"
    secret = os.fsencode(environ.get("PACKCAST_TOKEN", ""))
    if file is None and not secret:
        return None
    if file is not None:
        try:
            with path(file).open("rb") as stream:
                secret = stream.read(MAX_TOKEN_NBYTES + 1).strip()
                may_all_read = os.fstat(stream.fileno()).st_mode & stat.S_IROTH
        except OSError as error:
            raise UsageError(
                f"{where}: {error.strerror}",
                hint=f"make one with `openssl rand -hex 16 > {file}`",
            ) from None
        if not secret:
            raise UsageError(f"{where} is empty", hint="`openssl rand -hex 16` makes a token")
        if may_all_read:
            warn(f"{where}: every user of this host can read the token; `chmod 600` prevents that")
    warning = check_token(where, secret)
    if warning:
        warn(warning)
    return secret


def json_target(text: str | None) -> str | None:
    """The file of --json, checked before the transfer."""
    return text if text is None or text == "-" else _writable("--json", text)


def log_target(text: str | None) -> str | None:
    """Where --log-json writes."""
    if text == "-":
        raise UsageError("--log-json: standard output is for the result", hint="name a file")
    return None if text is None else _writable("--log-json", text)


def _writable(option: str, text: str) -> str:
    file = path(check_template(option, text))
    if file.is_dir():
        raise UsageError(f"{option}: {text} is a directory", hint="give a file's name")
    if not any(name in str(file.parent) for name in PLACEHOLDERS):
        if not file.parent.is_dir():
            raise UsageError(
                f"{option}: the directory {file.parent} does not exist", hint="create it first"
            )
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UsageError(f"{option}: {text} is not writable", hint=_WRITABLE)
    return str(file)


def check_send(settings: Settings, launch: Launch, *, nproc: int | None) -> None:
    """The ranks of `send` must be given once, by a launcher or by an option."""
    validation.check_send(settings, launch, option, nproc=nproc, hint=validation.WAYS_TO_LAUNCH)


def check_recv(
    settings: Settings, launch: Launch, *, json: str | None, log: str | None = None
) -> None:
    """Without a launcher `recv` needs the sender's address."""
    for name, file in (("--json", json), ("--log-json", log)):
        if launch.kind != "none" and file is not None and "{rank}" not in file:
            raise UsageError(
                f"{name}: all ranks would write the same file", hint="put {rank} in its name"
            )
    validation.check_recv(settings, launch, option, hint=LISTENING_SENDER)


def refuse_unused(
    typed: Collection[str], *, without_launcher: bool, writes: bool, has_manifest: bool
) -> None:
    """Raise UsageError for an option on the command line that would have no effect.

    `without_launcher`: a sender with --workers, whose workers have options of their own. Variables
    of the environment are not checked: they may be set for all commands of a host.
    """
    for name in _WORKERS_OWN:
        if name in typed and without_launcher:
            raise UsageError(
                f"{option(name)} has no effect here: with --workers, only the receivers write or"
                " compare",
                hint=f"give it to the workers: `packcast recv HOST:PORT {option(name)} ...`",
            )
    if "force" in typed and not writes:
        raise UsageError("--force needs --out", hint="it replaces the copy in --out DIR")
    if "digest" in typed and not has_manifest:
        raise UsageError("--digest needs --manifest", hint="it is the kind of its digests")


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
