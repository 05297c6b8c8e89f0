"""Whether what a user asks for goes with how this process was started: by a launcher, or not.

Pure. `said` turns a setting's name into what the user calls it: `--listen`, or `listen=`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from packcast.errors import RendezvousError, UsageError
from packcast.group.launch import ALONE, Launch, detect_launch
from packcast.settings import Settings

Said = Callable[[str], str]

WAYS_TO_LAUNCH = """ways to start the workers:
    here, three ranks   packcast send CKPT --out 'DIR-{rank}' --nproc 3
    on other hosts      packcast send CKPT --workers 3 --listen HOST:29400
    under torchrun      torchrun --no-python --nproc-per-node 4 packcast send CKPT --out D-{rank}
    under Slurm         srun packcast send CKPT --out DIR"""


def launch_of(environ: Mapping[str, str], *, by_address: bool) -> Launch:
    """Who started this process, unless the user says by address who takes part: that goes first.

    Many a process has a rank in a launch that is another's: a worker's in its own tensor parallel
    group, a trainer's beside rollout workers. Its place on its host stays what it is.
    """
    if not by_address:
        return detect_launch(environ)
    try:
        launch = detect_launch(environ)
    except RendezvousError:
        return ALONE
    return replace(launch, kind="none", rank=0, world_size=1)


def check_send(
    settings: Settings, launch: Launch, said: Said, *, nproc: int | None, ways: str
) -> None:
    """Who takes part must be said once, by a launcher or by an option; `ways` is the hint."""
    launched = launch.kind != "none"
    if launched and nproc is not None:
        raise UsageError(
            f"{said('nproc')} is for use without a launcher; this process was started by "
            f"{launch.kind}, which says how many ranks there are"
        )
    if nproc is not None and settings.workers is not None:
        raise UsageError(
            f"{said('nproc')} starts the workers itself; {said('workers')} waits for others"
        )
    if settings.workers is not None and settings.address is None:
        raise UsageError(
            f"{said('workers')} needs {said('listen')}, host and port",
            hint="the host is a name of this one that the workers reach",
        )
    if settings.address is not None and settings.workers is None:
        raise UsageError(f"{said('listen')} needs {said('workers')}: how many receivers will come")
    if not launched and nproc is None and settings.workers is None:
        raise UsageError("there is nobody to send to", hint=ways)
    check_port(settings.port, launch, said, without_launcher="listen")


def check_recv(settings: Settings, launch: Launch, said: Said, *, ways: str) -> None:
    """Without a launcher it must be said where the sender is."""
    launched = launch.kind != "none"
    if launched and settings.rank is not None:
        raise UsageError(
            f"{said('rank')} is for use without a launcher; {launch.kind} gives out ranks"
        )
    if not launched and settings.address is None:
        raise UsageError(
            f"where is the sender? no {said('address')} was given, and there is no launcher",
            hint=ways,
        )
    if settings.address is not None and settings.address[1] == 0:
        raise UsageError("port 0 is not a place to connect to")
    check_port(settings.port, launch, said, without_launcher="listen")


def check_port(
    port: int | None, launch: Launch, said: Said, *, without_launcher: str | None = None
) -> None:
    """A port is chosen for Slurm only; `without_launcher` is the setting that says it there."""
    if port is not None and launch.kind != "slurm":
        hint = "torchrun has --master-port"
        if without_launcher is not None:
            hint += f"; without a launcher there is {said(without_launcher)}"
        raise UsageError(f"{said('port')} is for Slurm", hint=hint)
