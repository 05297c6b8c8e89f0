"""Launch validation: whether the options fit the launcher. Pure.

`name_of` turns a setting's name into the user's: `--listen`, or `listen=`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from packcast.errors import RendezvousError, UsageError
from packcast.launch.launchers import ALONE, Launch, detect_launch
from packcast.settings import Settings

NameOf = Callable[[str], str]

WAYS_TO_LAUNCH = """ways to start the workers:
    here, three ranks   packcast send CKPT --out 'DIR-{rank}' --nproc 3
    on other hosts      packcast send CKPT --workers 3 --listen HOST:29400
    under torchrun      torchrun --no-python --nproc-per-node 4 packcast send CKPT --out D-{rank}
    under Slurm         srun packcast send CKPT --out DIR
    under mpirun        mpirun -n 4 packcast send CKPT --out 'D-{rank}'"""


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
    launched = launch.kind != "none"
    if launched and nproc is not None:
        raise UsageError(
            f"{name_of('nproc')} is for use without a launcher; this process was started by "
            f"{launch.kind}, which sets the number of ranks",
            hint=f"leave out {name_of('nproc')}",
        )
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
    if not launched and nproc is None and settings.workers is None:
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
    if settings.address is not None and settings.address[1] == 0:
        raise UsageError("port 0 cannot be connected to", hint="give the port that `send` shows")
    check_port(settings.port, launch, name_of, without_launcher="listen")


def check_port(
    port: int | None, launch: Launch, name_of: NameOf, *, without_launcher: str | None = None
) -> None:
    """`port` is for Slurm and mpirun; `without_launcher` is the option without a launcher."""
    if port is not None and launch.kind not in ("slurm", "mpirun"):
        hint = "torchrun has --master-port"
        if without_launcher is not None:
            hint += f"; without a launcher there is {name_of(without_launcher)}"
        raise UsageError(f"{name_of('port')} is only for Slurm and mpirun", hint=hint)
