"""The options of `packcast bench` that other commands lack, or that are lists here."""

from __future__ import annotations

from typing import Annotated

import typer

from packcast.cli.options import LAUNCH, OUTPUT, option

WEIGHTS = "What is measured"
SWEEP = "Sweep"

Checkpoint = Annotated[
    str | None,
    typer.Argument(
        metavar="CKPT",
        help="A checkpoint to measure with, instead of generated weights.",
        show_default=False,
    ),
]
Shape = Annotated[
    str | None,
    option(
        "--shape",
        metavar="LIST",
        panel=WEIGHTS,
        help="Generated weights: dense (like Llama), moe (matrices of 3 MiB), tiny (tensors of "
        "16 KiB). \\[default: dense]",
    ),
]
Size = Annotated[
    str | None,
    option(
        "--size",
        metavar="SIZE",
        panel=WEIGHTS,
        help="Bytes of generated weights. \\[default: 256MiB; with GPUs 8GiB]",
    ),
]
Source = Annotated[
    str,
    option(
        "--source",
        metavar="LIST",
        panel=WEIGHTS,
        help="Where the bytes come from: file, resident (on the device already).",
    ),
]
Sink = Annotated[
    str | None,
    option(
        "--sink",
        metavar="LIST",
        panel=WEIGHTS,
        help="Where the bytes go: discard, land (in tensors on the device), write, verify. "
        "\\[default: discard,write; of resident weights discard,land]",
    ),
]
Cold = Annotated[
    bool,
    option(
        "--cold",
        panel=WEIGHTS,
        help="Before each run drop the source's files from the page cache, and check that.",
    ),
]
Directory = Annotated[
    str | None,
    option(
        "--dir",
        metavar="DIR",
        panel=WEIGHTS,
        help="Directory for generated checkpoints. \\[default: /dev/shm if it has room, else "
        "the directory for temporary files]",
    ),
]
WriteDirectory = Annotated[
    str | None,
    option(
        "--write-dir",
        metavar="DIR",
        panel=WEIGHTS,
        help="Directory for the sink `write`. \\[default: --dir]",
    ),
]

BufferSizes = Annotated[
    str,
    option(
        "--buffer-size",
        metavar="LIST",
        panel=SWEEP,
        help="Most bytes in one broadcast; multiples of 1MiB.",
    ),
]
BufferCounts = Annotated[
    str, option("--num-buffers", metavar="LIST", panel=SWEEP, help="Buffers on each device.")
]
Readers = Annotated[
    str,
    option(
        "--readers",
        metavar="LIST",
        panel=SWEEP,
        help="How many ranks read and send; `all` for every rank.",
    ),
]
Runs = Annotated[
    int,
    option(
        "--runs", metavar="N", min=1, max=10_000, panel=SWEEP, help="Measured runs of each case."
    ),
]
Warmup = Annotated[
    int,
    option(
        "--warmup",
        metavar="N",
        min=0,
        max=1000,
        panel=SWEEP,
        help="Runs of each case before those, to warm up.",
    ),
]
NoBaselines = Annotated[bool, option("--no-baselines", panel=SWEEP, help="Measure packcast only.")]
NoLimits = Annotated[
    bool, option("--no-limits", panel=SWEEP, help="Do not measure the hardware's limits.")
]
NoCheck = Annotated[
    bool, option("--no-check", panel=SWEEP, help="Do not compare what arrived with what was sent.")
]

Nproc = Annotated[
    int | None,
    option(
        "--nproc",
        metavar="N",
        min=2,
        panel=LAUNCH,
        help="Start N ranks on this machine. \\[default without a launcher: one per GPU, or 2]",
    ),
]
ExportJson = Annotated[
    str | None,
    option(
        "--export-json",
        metavar="FILE|-",
        panel=OUTPUT,
        help="Write all results as JSON, with every run of every rank; again after each row.",
    ),
]
ExportCsv = Annotated[
    str | None, option("--export-csv", metavar="FILE|-", panel=OUTPUT, help="Write a line per row.")
]
ExportMarkdown = Annotated[
    str | None,
    option(
        "--export-markdown", metavar="FILE|-", panel=OUTPUT, help="Write the table as markdown."
    ),
]
Plot = Annotated[
    str | None,
    option(
        "--plot",
        metavar="FILE.png|svg",
        panel=OUTPUT,
        help="Draw throughput against buffer size. Needs packcast\\[plot].",
    ),
]
MinBandwidth = Annotated[
    str | None,
    option(
        "--min-bandwidth",
        metavar="RATE",
        panel=OUTPUT,
        help="Exit 5 unless the best row of each table reaches it, for example 10GB/s.",
    ),
]
Quiet = Annotated[
    bool, option("--quiet", short="-q", panel=OUTPUT, help="Only errors, and the table at the end.")
]
