"""Which launcher started this process (`--nproc`, torchrun, Slurm, mpirun or none), as which rank.

Reads only environments that are passed in; knows no torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packcast.control.addresses import says_loopback
from packcast.errors import RendezvousError
from packcast.launch.handover import HANDOVER_VARIABLE, LOOPBACK
from packcast.settings import is_host

# From here on Slurm's step ids are no steps of `srun` but the pending, extern, batch and
# interactive ones (slurm.h): one process runs there, whatever the job's number of tasks says.
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0

_DERIVED_PORTS = range(20_000, 30_000)  # below every usual range of ephemeral ports

# Rank, world size, rank on this host and number of ranks on this host, by the launchers of MPI.
_OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH and Intel MPI
MPI_JOB_VARIABLE = "PMIX_NAMESPACE"  # Open MPI's name of the launch; Hydra sets nothing like it


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's rank of `world_size`, and among those of its host.

    `is_one_host`: all ranks are certainly on this host; the same on all ranks.
    """

    kind: Literal["nproc", "torchrun", "slurm", "mpirun", "none"]
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    is_one_host: bool = False


ALONE = Launch("none", rank=0, world_size=1, local_rank=0, local_world_size=1)


def detect_launch(environ: Mapping[str, str]) -> Launch:
    """The launcher, by its variables; raises RendezvousError if they are not valid."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _nproc(environ) if HANDOVER_VARIABLE in environ else _torchrun(environ)
    mpi = _mpi_variables(environ)
    # What mpirun starts inside Slurm may have the numbers of the step that runs mpirun's daemons.
    if mpi is not None and _number(environ, mpi[1]) > 1:
        return _mpirun(environ, mpi)
    if "SLURM_PROCID" in environ and _is_srun_step(environ):
        launch = _slurm(environ)
        # `srun --pty bash` is a step of one task: a shell, not a launch.
        if launch.world_size > 1:
            return launch
    return ALONE


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[07-09,12],cpu3` -> `gpu07`."""
    match = re.match(r"(?:[^,\[\]]+|\[[^\[\]]*\])+", nodelist)
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0]) if match else ""
    if not host:
        raise RendezvousError(f"Slurm's node list {nodelist!r} names no host")
    return host


def slurm_nodelist(environ: Mapping[str, str]) -> str:
    """The step's hosts, in Slurm's notation; rank 0 runs on the first of them."""
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise RendezvousError("neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set")
    return nodelist


def slurm_port(environ: Mapping[str, str]) -> int:
    """The store's port: equal on all ranks of a step, and most likely different for others."""
    job = _number(environ, "SLURM_JOB_ID" if "SLURM_JOB_ID" in environ else "SLURM_JOBID")
    step = _number(environ, "SLURM_STEP_ID")
    # 31: two jobs that run at once have near ids, and seldom as many as 31 steps.
    return _DERIVED_PORTS[(31 * job + step) % len(_DERIVED_PORTS)]


def mpi_port(environ: Mapping[str, str]) -> int:
    """As `slurm_port`, for a launch of mpirun whose ranks are all on one host."""
    job = environ.get(MPI_JOB_VARIABLE)
    if job is None:
        raise RendezvousError(
            f"mpirun has set no {MPI_JOB_VARIABLE} from which to derive a port",
            hint="choose one with --port, such as --port 29400, the same for all ranks",
        )
    return _DERIVED_PORTS[zlib.crc32(job.encode()) % len(_DERIVED_PORTS)]


def launch_name(launch: Launch, environ: Mapping[str, str]) -> str | None:
    """What tells a launch of Slurm or mpirun from others of this user, fit for a file's name."""
    if launch.kind == "slurm":
        job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID", "")
        name = f"{job}.{environ['SLURM_STEP_ID']}"
    elif launch.kind == "mpirun":
        name = environ.get(MPI_JOB_VARIABLE, "")
    else:
        return None
    return f"{launch.kind}-{zlib.crc32(name.encode()):08x}" if name else None


def rendezvous_address(
    launch: Launch, environ: Mapping[str, str], port: int | None
) -> tuple[str, int]:
    """Host and port of the launcher's store; `port` replaces the one of Slurm or mpirun.

    Raises RendezvousError if the launcher's variables have no valid address.
    """
    if launch.kind == "slurm":
        where, host = "Slurm's node list", first_host(slurm_nodelist(environ))
        port = port or slurm_port(environ)
    elif launch.kind == "mpirun":
        where, host = "MASTER_ADDR", (environ.get("MASTER_ADDR") or LOOPBACK).strip("[]")
        if port is None:
            is_given = "MASTER_PORT" in environ
            port = _number(environ, "MASTER_PORT") if is_given else mpi_port(environ)
    else:
        where, host = "MASTER_ADDR", environ["MASTER_ADDR"].strip("[]")
        port = _number(environ, "MASTER_PORT")
    if not is_host(host):
        raise RendezvousError(f"{where} names {host!r}, which is not a host name or address")
    if not 0 < port < 65536:
        raise RendezvousError(f"the launcher's variable MASTER_PORT is {port}, not a port")
    return host, port


def _nproc(environ: Mapping[str, str]) -> Launch:
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    return _checked(Launch("nproc", rank, world_size, rank, world_size, is_one_host=True))


def _torchrun(environ: Mapping[str, str]) -> Launch:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            raise RendezvousError(
                f"RANK and WORLD_SIZE are set, but {name} is not",
                hint="start packcast with torchrun, or unset RANK and WORLD_SIZE",
            )
    rank = _number(environ, "RANK")
    world_size = _number(environ, "WORLD_SIZE")
    local_rank = _number(environ, "LOCAL_RANK", 0 if _is_one_per_pod(environ) else rank)
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", local_rank + 1)
    are_all_here = "LOCAL_WORLD_SIZE" in environ and local_world_size == world_size
    return _checked(
        Launch(
            "torchrun",
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            is_one_host=are_all_here or says_loopback(environ["MASTER_ADDR"].strip("[]")),
        )
    )


def _is_one_per_pod(environ: Mapping[str, str]) -> bool:
    """Whether Kubeflow's operator started this pod without torchrun: RANK counts pods then.

    Otherwise, without LOCAL_RANK, RANK was set by hand, most likely on one host.
    """
    return "PET_NODE_RANK" in environ and environ["PET_NODE_RANK"] == environ["RANK"]


def _mpi_variables(environ: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """The names of the variables that mpirun has set for this process; None without mpirun."""
    if _OPEN_MPI[0] in environ and _OPEN_MPI[1] in environ:
        return _OPEN_MPI
    if _HYDRA[0] in environ and _HYDRA[1] in environ:
        # `srun --mpi=pmi2` sets them too, with the numbers of its own tasks.
        is_sruns = environ.get("SLURM_PROCID") == environ[_HYDRA[0]] and _is_srun_step(environ)
        return None if is_sruns else _HYDRA
    return None


def _mpirun(environ: Mapping[str, str], names: tuple[str, str, str, str]) -> Launch:
    rank, world_size = _number(environ, names[0]), _number(environ, names[1])
    local_rank = _number(environ, names[2], 0)
    local_world_size = _number(environ, names[3], local_rank + 1)
    are_all_here = names[3] in environ and local_world_size == world_size
    address = environ.get("MASTER_ADDR", "")
    if not are_all_here:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise RendezvousError(
                    f"mpirun has started ranks on several hosts, but {name} is not set",
                    hint="mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29400, HOST being where rank 0"
                    " runs; with MPICH -genv MASTER_ADDR HOST -genv MASTER_PORT 29400",
                )
    return _checked(
        Launch(
            "mpirun",
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            is_one_host=are_all_here or says_loopback(address.strip("[]")),
        )
    )


def _is_srun_step(environ: Mapping[str, str]) -> bool:
    return 0 <= _number(environ, "SLURM_STEP_ID", -1) < _FIRST_SPECIAL_STEP


def _slurm(environ: Mapping[str, str]) -> Launch:
    # The step's own count first: SLURM_NTASKS can be the whole job's.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _number(environ, tasks)
    local_rank = _number(environ, "SLURM_LOCALID", 0)
    tasks_here = _tasks_here(environ)
    return _checked(
        Launch(
            "slurm",
            rank=_number(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=max(tasks_here, local_rank + 1),
            is_one_host=tasks_here == world_size,
        )
    )


def _tasks_here(environ: Mapping[str, str]) -> int:
    """This node's count out of `2(x3),1`: two tasks on each of three nodes, then one."""
    node = _number(environ, "SLURM_NODEID", 0)
    for count, times in re.findall(
        r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    ):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    return 1


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size:
        raise RendezvousError(
            f"the launcher gave rank {launch.rank} in a world of {launch.world_size}",
            hint="ranks count from 0; check RANK and WORLD_SIZE",
        )
    return launch


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        what = "is not set" if text is None else f"is {text!r}, not a number"
        raise RendezvousError(f"the launcher's variable {name} {what}") from None
