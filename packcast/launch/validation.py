"""Validation of arguments: each, together, and with the launcher. Pure.

`name_of` turns an argument's name into the user's: `--listen`, `listen` or `listen=`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from packcast.errors import RendezvousError, UsageError
from packcast.launch.launchers import ALONE, Launch, detect_launch
from packcast.packed.plan import check_ring
from packcast.settings import (
    Command,
    Settings,
    SinkKind,
    check_address_to_reach,
    check_template,
    named,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NameOf = Callable[[str], str]

_PLAIN = (
    (r"Value error, ", ""),
    (r"Input should be a valid integer.*", "must be a whole number"),
    (r"Input should be a valid boolean.*", "must be true or false"),
    (r"Input should be greater than or equal to (\S+)", r"must be at least \1"),
    (r"Input should be less than or equal to (\S+)", r"must be at most \1"),
    (r"Input (should be|is)", r"\1"),
)

WAYS_TO_LAUNCH = """ways to start the workers:
    here, three ranks   packcast send CKPT --out 'DIR-{rank}' --nproc 3
    on other hosts      packcast send CKPT --workers 3 --listen HOST:29400
    under torchrun      torchrun --no-python --nproc-per-node 4 packcast send CKPT --out D-{rank}
    under Slurm         srun packcast send CKPT --out DIR
    under mpirun        mpirun -n 4 packcast send CKPT --out 'D-{rank}'"""


def settings_of(
    command: Command,
    name_of: NameOf,
    *,
    out: str | None,
    verify: str | None,
    other_destinations: Mapping[str, object] | None = None,
    **arguments: object,
) -> Settings:
    """The settings from the arguments of a command line or a call, with their checks.

    The bytes go to `out`, are compared with `verify`, or are dropped. With `other_destinations`, as
    they were given, exactly one must be given, else at most one. Raises UsageError.
    """
    from pydantic import TypeAdapter, ValidationError  # --help does without

    sink, target = _destination(name_of, out, verify, other_destinations)
    given = {"command": command, "sink": sink, "target": target, **arguments}
    try:
        settings = TypeAdapter(Settings).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        listens = command == "send" and name == "address"
        raise _usage_error(name_of("listen" if listens else name), first) from None
    if settings.in_place and sink != "write":
        raise UsageError(
            f"{name_of('in_place')} needs {name_of('out')}", hint="it keeps that directory"
        )
    if command == "send":
        check_ring(settings.buffer_size, settings.num_buffers, settings.staging)
    return settings


def _destination(
    name_of: NameOf, out: str | None, verify: str | None, others: Mapping[str, object] | None
) -> tuple[SinkKind, str | None]:
    choices: dict[str, object] = {"out": out, "verify": verify, **(others or {})}
    names = [name_of(name) for name in choices]
    given = [value for value in choices.values() if value is not None and value is not False]
    if len(given) > 1 or (others is not None and not given):
        amount = "only one of" if given else "one of"
        raise UsageError(f"give {amount} {', '.join(names[:-1])} or {names[-1]}")
    if out is not None:
        return "write", named(name_of("out"), check_template, out)
    if verify is not None:
        return "verify", named(name_of("verify"), check_template, verify)
    return "discard", None


def _usage_error(name: str, error: ErrorDetails) -> UsageError:
    """What pydantic has found, with the hint of our own check if it was one."""
    context = error.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, UsageError):
        return UsageError(f"{name}: {cause.message}", hint=cause.hint)
    if "expected" in context:
        return UsageError(f"{name}: {error['input']!r} is not one of {context['expected']}")
    return UsageError(f"{name}: {plain_words(error['msg'])}, not {error['input']!r}")


def plain_words(message: str) -> str:
    """A message of pydantic, or of typer that quotes it, in plain words."""
    for pattern, words in _PLAIN:
        message = re.sub(pattern, words, message)
    return message


def launch_of(environ: Mapping[str, str], *, by_address: bool) -> Launch:
    """The launcher's launch, or none if explicit arguments choose the ranks.

    A process may have a rank in a launch that is not this transfer's: in a trainer, or in a rollout
    worker's tensor parallel group. So explicit arguments win over the environment, of which only
    the local rank is kept.
    """
    if not by_address:
        return detect_launch(environ)
    try:
        launch = detect_launch(environ)
    except RendezvousError:
        return ALONE
    return replace(launch, kind="none", rank=0, world_size=1, is_one_host=False)


def check_send(
    settings: Settings, launch: Launch, name_of: NameOf, *, nproc: int | None, hint: str
) -> None:
    """The ranks must be chosen once, by a launcher or by an option.

    `hint` lists the ways to start workers, for an error without any.
    """
    check_nproc(nproc, launch, name_of)
    if nproc is not None and settings.workers is not None:
        raise UsageError(
            f"{name_of('nproc')} starts the workers itself; {name_of('workers')} waits for others",
            hint="give only one of them",
        )
    if settings.workers is not None and settings.address is None:
        raise UsageError(
            f"{name_of('workers')} needs {name_of('listen')}",
            hint="give a name or address of this host that the workers can reach, and a port",
        )
    if settings.address is not None and settings.workers is None:
        raise UsageError(
            f"{name_of('listen')} needs {name_of('workers')}: how many receivers will join",
            hint="the number of `packcast recv` that you start",
        )
    if launch.kind == "none" and nproc is None and settings.workers is None:
        raise UsageError("no workers to send to: no launcher started this process", hint=hint)
    check_port(settings.port, launch, name_of, without_launcher="listen")


def check_recv(settings: Settings, launch: Launch, name_of: NameOf, *, hint: str) -> None:
    """Without a launcher the sender's address is needed."""
    launched = launch.kind != "none"
    if launched and settings.rank is not None:
        raise UsageError(
            f"{name_of('rank')} is for use without a launcher; {launch.kind} assigns the ranks",
            hint=f"leave out {name_of('rank')}",
        )
    if not launched and settings.address is None:
        raise UsageError(
            f"no address of the sender: {name_of('address')} is missing, and there is no launcher",
            hint=hint,
        )
    if settings.address is not None:
        check_address_to_reach(settings.address)
    check_port(settings.port, launch, name_of, without_launcher="listen")


def check_nproc(nproc: int | None, launch: Launch, name_of: NameOf) -> None:
    """Ranks are started by a launcher, or here."""
    if nproc is not None and launch.kind != "none":
        raise UsageError(
            f"{name_of('nproc')} is for use without a launcher; this process was started by "
            f"{launch.kind}, which sets the number of ranks",
            hint=f"leave out {name_of('nproc')}",
        )


def check_port(
    port: int | None, launch: Launch, name_of: NameOf, *, without_launcher: str | None = None
) -> None:
    """`port` is for Slurm and mpirun; `without_launcher` is the option without a launcher."""
    if port is not None and launch.kind not in ("slurm", "mpirun"):
        hint = "torchrun has --master-port"
        if without_launcher is not None:
            hint += f"; without a launcher there is {name_of(without_launcher)}"
        raise UsageError(f"{name_of('port')} is only for Slurm and mpirun", hint=hint)
