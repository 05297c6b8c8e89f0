"""The options of the command line, declared once: names, help, panels, environment variables.

`cli/parsing.py` parses and checks the values.
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
    """The environment variable of an option: PACKCAST_BUFFER_SIZE."""
    return "PACKCAST_" + name.removeprefix("--").replace("-", "_").upper()


def option(
    name: str,
    panel: str,
    metavar: str | None = None,
    help: str = "",
    *,
    short: str | None = None,
    min: int | None = None,
    max: int | None = None,
) -> Any:
    """An option with its environment variable, which --help explains once for all options."""
    return typer.Option(
        *filter(None, (name, short)),
        envvar=variable_of(name),
        show_envvar=False,
        rich_help_panel=panel,
        help=help,
        metavar=metavar,
        min=min,
        max=max,
    )


def argument(metavar: str, help: str) -> Any:
    """A positional argument, whose default the help does not show."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def flag(name: str, panel: str, help: str, *, short: str | None = None) -> Any:
    """An option without a value; the empty metavar keeps `<bool>` out of the help."""
    return option(name, panel, "", help, short=short)


Checkpoint = Annotated[
    str,
    argument(
        "CKPT",
        "A .safetensors file, or a directory of shards, index and sidecars; or a model in the "
        "Hugging Face cache, as org/name or org/name@revision.",
    ),
]
Out = Annotated[
    str | None,
    option(
        "--out",
        DESTINATION,
        "DIR",
        "Write the copy to DIR. {rank}, {local_rank} and {host} are filled in.",
    ),
]
Verify = Annotated[
    str | None,
    option("--verify", DESTINATION, "CKPT", "Compare with the local CKPT; write nothing."),
]
Discard = Annotated[
    bool, flag("--discard", DESTINATION, "Verify the received bytes and drop them.")
]
Force = Annotated[
    bool,
    flag(
        "--force",
        DESTINATION,
        "Replace an earlier copy in DIR, or files with the names of those sent. A DIR with any "
        "other content is an error.",
    ),
]
InPlace = Annotated[
    bool,
    flag(
        "--in-place",
        DESTINATION,
        "Write into DIR itself, for example a mounted volume: file by file, index last, not "
        "atomic.",
    ),
]
Manifest = Annotated[
    str | None,
    option(
        "--manifest",
        OUTPUT,
        "FILE",
        "Read the copy again and write its hashes, for `xxhsum -c` or `sha256sum -c`. {rank}, "
        "{local_rank} and {host} are filled in.",
    ),
]
DigestChoice = Annotated[
    Literal["xxh128", "sha256"],
    option(
        "--digest", OUTPUT, None, "The hash of --manifest: XXH3 with 128 bits, or SHA-256 (slower)."
    ),
]
FileReport = Annotated[
    str | None,
    option(
        "--report",
        OUTPUT,
        "FILE",
        "Write a line for each file and tensor: = same, * differs, - missing, + new, ! error.",
    ),
]
NoSidecars = Annotated[
    bool, flag("--no-sidecars", SELECTION, "Send only shards and index: no config, no tokenizer.")
]
AllFiles = Annotated[
    bool, flag("--all-files", SELECTION, "Send every .safetensors file, whatever the index says.")
]
FollowLinks = Annotated[
    bool,
    flag("--follow-links", SELECTION, "Also follow symlinks that point outside the checkpoint."),
]
ExcludeFiles = Annotated[
    list[str] | None,
    option(
        "--exclude-files",
        SELECTION,
        "GLOB",
        "Leave out matching files and folders, as 'original/*'. May be repeated.",
    ),
]
Include = Annotated[
    list[str] | None,
    option("--include", SELECTION, "GLOB", "Send only matching tensors. May be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    option("--exclude", SELECTION, "GLOB", "Leave out matching tensors. May be repeated."),
]
Download = Annotated[
    bool,
    flag("--download", SELECTION, "First download a model that is not in the Hugging Face cache."),
]
DryRun = Annotated[
    bool, flag("--dry-run", SELECTION, "Show what would be sent and its memory, then stop.")
]
Nproc = Annotated[
    int | None,
    option("--nproc", LAUNCH, "N", "Start N ranks here: the sender and N-1 workers.", min=2),
]
Workers = Annotated[
    int | None, option("--workers", LAUNCH, "N", "No launcher: wait for N `packcast recv`.")
]
Listen = Annotated[
    str | None,
    option(
        "--listen", LAUNCH, "HOST:PORT", "No launcher: address of the sender. Port 0: any free one."
    ),
]
Port = Annotated[
    int | None,
    option(
        "--port",
        LAUNCH,
        "PORT",
        "Slurm, mpirun: rank 0's port, instead of one derived from the job.",
    ),
]
PortRange = Annotated[
    str | None,
    option(
        "--port-range",
        LAUNCH,
        "A-B",
        "Listen only on ports A to B (two are needed) where --listen and --port choose none. gloo "
        "and NCCL use others: see the README.",
    ),
]
Address = Annotated[str | None, argument("[HOST:PORT]", "No launcher: where the sender listens.")]
Rank = Annotated[
    int | None,
    option(
        "--rank",
        LAUNCH,
        "N",
        "No launcher: be this rank. Otherwise ranks go by host name, then arrival.",
    ),
]
TokenFile = Annotated[
    str | None,
    option("--token-file", LAUNCH, "FILE", "File with the shared secret. Or set PACKCAST_TOKEN."),
]
Readers = Annotated[
    str, option("--readers", LAUNCH, "N|all", "How many `send` ranks read and send the checkpoint.")
]
MaxRate = Annotated[
    str | None,
    option("--max-rate", TUNING, "RATE", "Send no faster than this, as in 2GB/s or 500MB/s."),
]
BufferSize = Annotated[
    str | None,
    option(
        "--buffer-size",
        TUNING,
        "SIZE",
        f"Most bytes in one broadcast; a multiple of 1MiB. \\[default: {BUFFER_SIZE}]",
    ),
]
NumBuffers = Annotated[int, option("--num-buffers", TUNING, "N", "Buffers on each device.")]
Staging = Annotated[
    str,
    option(
        "--staging",
        TUNING,
        "SIZE",
        "Limit on pinned host memory for what a rank reads; as much for what it writes.",
    ),
]
BackendChoice = Annotated[
    Literal["auto", "nccl", "gloo"],
    option("--backend", TUNING, None, "auto: NCCL if each rank has its own GPU, else gloo."),
]
Device = Annotated[
    str, option("--device", TUNING, "auto|cpu|cuda|cuda:N", "Device of this rank's buffers.")
]
JoinTimeout = Annotated[
    str, option("--join-timeout", LIMITS, "TIME", "Time for all ranks to join.")
]
HeartbeatTimeout = Annotated[
    str,
    option("--heartbeat-timeout", LIMITS, "TIME", "Longest time without a heartbeat from a rank."),
]
StallTimeout = Annotated[
    str, option("--stall-timeout", LIMITS, "TIME", "Longest time without progress.")
]
Json = Annotated[
    str | None,
    option(
        "--json", OUTPUT, "FILE|-", "Write the result as JSON; with {rank} in FILE, on every rank."
    ),
]
LogJson = Annotated[
    str | None,
    option(
        "--log-json",
        OUTPUT,
        "FILE",
        "Write events as JSON lines; with {rank} in FILE, on every rank.",
    ),
]
Progress = Annotated[
    ProgressMode,
    option(
        "--progress",
        OUTPUT,
        None,
        "auto: rich on a terminal, else plain lines. none: warnings, errors and the summary.",
    ),
]
Quiet = Annotated[
    bool,
    flag("--quiet", OUTPUT, "Print only errors, and what the workers need to join.", short="-q"),
]
Verbose = Annotated[bool, flag("--verbose", OUTPUT, "Show the traceback of an error.", short="-v")]

# Of the commands for this machine alone.
Directories = Annotated[list[str], argument("DIR", "Copies. Several are compared with the first.")]
Against = Annotated[
    str | None,
    option(
        "--against",
        SELECTION,
        "FILE",
        "A manifest to compare with. \\[default: DIR.xxh128 or DIR.sha256, for one DIR]",
    ),
]
Folder = Annotated[
    str, argument("DIR", "A directory that copies were written into, or its parent.")
]
Folders = Annotated[
    list[str] | None,
    argument("[DIR]", "Where copies are to be written. [default: the current directory]"),
]
Reach = Annotated[
    str | None,
    option(
        "--reach",
        LAUNCH,
        "HOST:PORT",
        "Check that this host can resolve and reach the sender's address.",
    ),
]
NoTest = Annotated[bool, flag("--no-test", OUTPUT, "Skip the self-test.")]
Yes = Annotated[bool, flag("--yes", DESTINATION, "Remove the unused ones.")]
InspectJson = Annotated[
    str | None,
    option("--json", OUTPUT, "FILE|-", "Write the listing as JSON, instead of the table."),
]
Tensors = Annotated[bool, flag("--tensors", OUTPUT, "List every tensor.")]
