"""From options to settings, and the checks of what is no setting: files, and their combinations.

Every error is a UsageError that names the option. Imports no torch; has no side effects.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from packcast.errors import UsageError
from packcast.launch import validation
from packcast.launch.launchers import Launch
from packcast.launch.secret import token_of
from packcast.settings import (
    MAX_TOKEN_NBYTES,
    PLACEHOLDERS,
    Command,
    Settings,
    check_path,
    check_template,
    named,
)

_ADDRESS = "for example node1:29400, or [::1]:29400"
_WORKERS_OWN = ("out", "verify", "force", "in_place", "manifest", "report")

_SAME_AS_OPTION = {field.name for field in fields(Settings)} - {
    *("command", "checkpoint", "sink", "target", "sidecars"),
    *("address", "port_range", "token", "token_file"),
}
_WRITABLE = "check the permissions, or choose another file"
LISTENING_SENDER = "`packcast send --workers N --listen HOST:PORT` prints the line to run"


def option(name: str) -> str:
    """The option of a setting."""
    return "HOST:PORT" if name == "address" else f"--{name.removesuffix('_s').replace('_', '-')}"


def path(text: str) -> Path:
    """A path, with `~` expanded, which no shell does in `--out=~/x` or in quotes."""
    return Path(text).expanduser() if text.startswith("~") else Path(text)


def settings(
    command: Command,
    options: Mapping[str, Any],
    warn: Callable[[str], None] = lambda _text: None,
    **fixed: object,
) -> Settings:
    """The settings by the options of a command, as typer has parsed them, but for the `fixed` ones.

    Sizes, rates and times are still texts.
    """
    given: dict[str, object] = {
        name: options[name.removesuffix("_s")]
        for name in _SAME_AS_OPTION
        if options.get(name.removesuffix("_s")) is not None
    }
    given["sidecars"] = not options.get("no_sidecars")
    for name in ("listen", "address"):
        if options.get(name):
            given["address"] = named(option(name), address, options[name])
    if options.get("port_range"):
        given["port_range"] = named("--port-range", port_range, options["port_range"])
    given["token"] = token(options.get("token_file"), warn)
    out, verify = options.get("out"), options.get("verify")
    try:
        return validation.settings_of(
            command,
            option,
            out=out and os.path.expanduser(out),
            verify=verify and os.path.expanduser(verify),
            other_destinations={"discard": options["discard"]} if "discard" in options else None,
            **given | fixed,
        )
    except UsageError as error:
        error.hint = error.hint or "--help describes each option"
        raise


def address(text: str) -> tuple[str, int]:
    """`host:29400`, `10.0.0.1:29400`, `[::1]:29400`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or not colon or (":" in host) != bracketed:
        raise UsageError(f"{text!r} is not HOST:PORT", hint=_ADDRESS)
    if not port.isdecimal():
        raise UsageError(f"{port!r} is not a port", hint="a port is at most 65535")
    return host[1:-1] if bracketed else host, int(port)


def port_range(text: str) -> tuple[int, int]:
    """`29400-29409`, both included."""
    first, dash, last = text.partition("-")
    if not dash or not first.isdecimal() or not last.isdecimal():
        raise UsageError(f"{text!r} is not A-B", hint="as in 29400-29409")
    return int(first), int(last)


def token(file: str | None, warn: Callable[[str], None] = lambda _text: None) -> bytes | None:
    """The shared secret: of --token-file, else of PACKCAST_TOKEN, else none."""
    if file is None:
        return token_of(None, os.environ, warn)
    where = f"--token-file: {file}"
    try:
        with path(file).open("rb") as stream:
            secret = stream.read(MAX_TOKEN_NBYTES + 1).strip()
            may_all_read = os.fstat(stream.fileno()).st_mode & stat.S_IROTH
    except OSError as error:
        raise UsageError(
            f"{where}: {error.strerror}", hint=f"make one with `openssl rand -hex 16 > {file}`"
        ) from None
    if not secret:
        raise UsageError(f"{where} is empty", hint="`openssl rand -hex 16` makes a token")
    if may_all_read:
        warn(f"{where}: every user of this host can read the token; `chmod 600` prevents that")
    return token_of(secret, os.environ, warn, where)


def json_target(text: str | None) -> str | None:
    """The file of --json, checked before the transfer."""
    return text if text is None or text == "-" else _template("--json", text)


def log_target(text: str | None) -> str | None:
    """Where --log-json writes."""
    if text == "-":
        raise UsageError("--log-json: standard output is for the result", hint="name a file")
    return None if text is None else _template("--log-json", text)


def _template(option: str, text: str) -> str:
    return str(writable(option, named(option, check_template, text)))


def writable(option: str, text: str) -> Path:
    """A file that can be written, as far as is known without writing it."""
    file = path(named(option, check_path, text))
    if file.is_dir():
        raise UsageError(f"{option}: {text} is a directory", hint="give a file's name")
    if not any(name in str(file.parent) for name in PLACEHOLDERS):
        if not file.parent.is_dir():
            raise UsageError(
                f"{option}: the directory {file.parent} does not exist", hint="create it first"
            )
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UsageError(f"{option}: {text} is not writable", hint=_WRITABLE)
    return file


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
