"""The options of the command line, declared once: names, help, panels, environment variables.

Knows nothing of what they are for; `cli/parsing.py` reads and checks the values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from packcast.cli.helps import BUFFER_SIZE

ProgressMode = Literal["auto", "rich", "plain", "none"]

DESTINATION = "Destination"
SELECTION = "What is sent"
LAUNCH = "Who takes part"
TUNING = "Buffers and devices"
LIMITS = "Time limits"
OUTPUT = "Output"

# A repeatable option's variable is split at spaces: PACKCAST_INCLUDE="a* b*".


def variable_of(name: str) -> str:
    """The variable that an option is read from where it is not typed: PACKCAST_BUFFER_SIZE."""
    return "PACKCAST_" + name.removeprefix("--").replace("-", "_").upper()


def option(
    *names: str,
    panel: str,
    help: str,
    metavar: str | None = None,
    min: int | None = None,
    max: int | None = None,
) -> Any:
    """An option with its variable, which the epilog explains once for all of them."""
    return typer.Option(
        *names,
        envvar=variable_of(names[0]),
        show_envvar=False,
        rich_help_panel=panel,
        help=help,
        metavar=metavar,
        min=min,
        max=max,
    )


def flag(*names: str, panel: str, help: str) -> Any:
    """An option without a value, which the help is not to ask for."""
    return option(*names, panel=panel, help=help, metavar="")


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A .safetensors file, or a directory of shards, index and sidecars; or a model in the "
        "Hugging Face cache, as org/name or org/name@revision.",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    option(
        "--out",
        metavar="DIR",
        panel=DESTINATION,
        help="Write the copy to DIR. {rank}, {local_rank} and {host} are filled in.",
    ),
]
Verify = Annotated[
    str | None,
    option(
        "--verify",
        metavar="CKPT",
        panel=DESTINATION,
        help="Compare with the local checkpoint CKPT; write nothing.",
    ),
]
Discard = Annotated[
    bool,
    flag(
        "--discard",
        panel=DESTINATION,
        help="Verify the received bytes and drop them.",
    ),
]
Force = Annotated[
    bool,
    flag(
        "--force",
        panel=DESTINATION,
        help="Replace an earlier copy in DIR, or files of the same names as those that are sent. "
        "A directory that holds anything else is left alone.",
    ),
]

InPlace = Annotated[
    bool,
    flag(
        "--in-place",
        panel=DESTINATION,
        help="Fill DIR itself, as where a container has it mounted: file by file, the index last, "
        "not in one step.",
    ),
]
Manifest = Annotated[
    str | None,
    option(
        "--manifest",
        metavar="FILE",
        panel=OUTPUT,
        help="Write the hashes of the copy's files, for `xxhsum -c` or `sha256sum -c`. It is read "
        "again for that. {rank}, {local_rank} and {host} are filled in.",
    ),
]
DigestChoice = Annotated[
    Literal["xxh128", "sha256"],
    option(
        "--digest",
        panel=OUTPUT,
        help="Of --manifest: XXH3 with 128 bits, or SHA-256, which takes longer.",
    ),
]
FileReport = Annotated[
    str | None,
    option(
        "--report",
        metavar="FILE",
        panel=OUTPUT,
        help="Write a line for each file and tensor: = same, * differs, - missing, + new, ! error.",
    ),
]
NoSidecars = Annotated[
    bool,
    flag(
        "--no-sidecars",
        panel=SELECTION,
        help="Only shards and their index: no config, no tokenizer.",
    ),
]
AllFiles = Annotated[
    bool,
    flag(
        "--all-files",
        panel=SELECTION,
        help="Every .safetensors file, whatever the index says.",
    ),
]
FollowLinks = Annotated[
    bool,
    flag(
        "--follow-links",
        panel=SELECTION,
        help="Symlinks that lead out of the checkpoint, too.",
    ),
]
ExcludeFiles = Annotated[
    list[str] | None,
    option(
        "--exclude-files",
        metavar="GLOB",
        panel=SELECTION,
        help="Not the files or folders whose names match, as in 'original/*'. May be repeated.",
    ),
]
Include = Annotated[
    list[str] | None,
    option(
        "--include",
        metavar="GLOB",
        panel=SELECTION,
        help="Only tensors whose names match. May be repeated.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    option(
        "--exclude",
        metavar="GLOB",
        panel=SELECTION,
        help="Not the tensors whose names match. May be repeated.",
    ),
]
Download = Annotated[
    bool,
    flag(
        "--download",
        panel=SELECTION,
        help="A model that is not in the Hugging Face cache is downloaded into it first.",
    ),
]
DryRun = Annotated[
    bool,
    flag(
        "--dry-run",
        panel=SELECTION,
        help="Show what would be sent and the memory it needs, then stop.",
    ),
]

Nproc = Annotated[
    int | None,
    option(
        "--nproc",
        metavar="N",
        min=2,
        panel=LAUNCH,
        help="Start N ranks on this machine: the sender and N-1 workers.",
    ),
]
Workers = Annotated[
    int | None,
    option(
        "--workers",
        metavar="N",
        min=1,
        panel=LAUNCH,
        help="No launcher: wait for N `packcast recv`.",
    ),
]
Listen = Annotated[
    str | None,
    option(
        "--listen",
        metavar="HOST:PORT",
        panel=LAUNCH,
        help="No launcher: where the workers find the sender. Port 0: any free one.",
    ),
]
Port = Annotated[
    int | None,
    option(
        "--port",
        metavar="PORT",
        min=1,
        max=65535,
        panel=LAUNCH,
        help="Slurm, mpirun: the port where rank 0 is met, instead of one derived from the job.",
    ),
]
PortRange = Annotated[
    str | None,
    option(
        "--port-range",
        metavar="A-B",
        panel=LAUNCH,
        help="Listen only on ports from A to B, where --listen and --port choose none. Two are "
        "needed at a time. gloo and NCCL take others: see the README.",
    ),
]
Address = Annotated[
    str | None,
    typer.Argument(
        metavar="[HOST:PORT]",
        help="No launcher: where the sender listens.",
        show_default=False,
    ),
]
Rank = Annotated[
    int | None,
    option(
        "--rank",
        metavar="N",
        min=1,
        panel=LAUNCH,
        help="No launcher: be this rank. Otherwise ranks go by host name, then arrival.",
    ),
]
TokenFile = Annotated[
    str | None,
    option(
        "--token-file",
        metavar="FILE",
        panel=LAUNCH,
        help="The secret that sender and workers share. Or set PACKCAST_TOKEN.",
    ),
]
Readers = Annotated[
    str,
    option(
        "--readers",
        metavar="N|all",
        panel=LAUNCH,
        help="How many `send` ranks read the checkpoint and share the sending.",
    ),
]
MaxRate = Annotated[
    str | None,
    option(
        "--max-rate",
        metavar="RATE",
        panel=TUNING,
        help="Send no faster than this, as in 2GB/s or 500MB/s.",
    ),
]

BufferSize = Annotated[
    str | None,
    option(
        "--buffer-size",
        metavar="SIZE",
        panel=TUNING,
        help=f"Most bytes in one broadcast; a multiple of 1MiB. \\[default: {BUFFER_SIZE}]",
    ),
]
NumBuffers = Annotated[
    int,
    option(
        "--num-buffers",
        metavar="N",
        panel=TUNING,
        help="Buffers on each device.",
    ),
]
Staging = Annotated[
    str,
    option(
        "--staging",
        metavar="SIZE",
        panel=TUNING,
        help="Most pinned host memory between files and buffers.",
    ),
]
BackendChoice = Annotated[
    Literal["auto", "nccl", "gloo"],
    option(
        "--backend",
        panel=TUNING,
        help="auto: NCCL where every rank has a GPU of its own, else gloo.",
    ),
]
Device = Annotated[
    str,
    option(
        "--device",
        metavar="auto|cpu|cuda|cuda:N",
        panel=TUNING,
        help="Where this rank keeps its buffers.",
    ),
]

JoinTimeout = Annotated[
    str,
    option(
        "--join-timeout",
        metavar="TIME",
        panel=LIMITS,
        help="Time for all ranks to join.",
    ),
]
HeartbeatTimeout = Annotated[
    str,
    option(
        "--heartbeat-timeout",
        metavar="TIME",
        panel=LIMITS,
        help="Longest time without a heartbeat from a rank.",
    ),
]
StallTimeout = Annotated[
    str,
    option(
        "--stall-timeout",
        metavar="TIME",
        panel=LIMITS,
        help="Longest time without progress while all ranks are alive.",
    ),
]

Json = Annotated[
    str | None,
    option(
        "--json",
        metavar="FILE|-",
        panel=OUTPUT,
        help="Write the result as JSON. With {rank} in FILE every rank writes its own.",
    ),
]
LogJson = Annotated[
    str | None,
    option(
        "--log-json",
        metavar="FILE",
        panel=OUTPUT,
        help="Write what happens, a JSON object on each line. With {rank} in FILE every rank's.",
    ),
]
Progress = Annotated[
    ProgressMode,
    option(
        "--progress",
        panel=OUTPUT,
        help="auto: rich on a terminal, else plain lines. none: warnings, errors and the summary.",
    ),
]
Quiet = Annotated[
    bool,
    flag(
        "--quiet",
        "-q",
        panel=OUTPUT,
        help="Only errors, and what cannot be done without.",
    ),
]
Verbose = Annotated[
    bool,
    flag(
        "--verbose",
        "-v",
        panel=OUTPUT,
        help="Show the traceback of an error.",
    ),
]
