"""The options of `packcast bench` that other commands lack, or that are lists here."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from packcast.cli.options import LAUNCH, OUTPUT, option

_weights = partial(option, panel="What is measured")
_sweep = partial(option, panel="Sweep")
_output = partial(option, panel=OUTPUT)

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
    _weights(
        "--shape",
        metavar="LIST",
        help="Generated weights: dense (like Llama), moe (matrices of 3 MiB), tiny (tensors of "
        "16 KiB). \\[default: dense]",
    ),
]
Size = Annotated[
    str | None,
    _weights(
        "--size",
        metavar="SIZE",
        help="Bytes of generated weights. \\[default: 256MiB; with GPUs 8GiB]",
    ),
]
Source = Annotated[
    str,
    _weights(
        "--source",
        metavar="LIST",
        help="Where the bytes come from: file, resident (on the device already).",
    ),
]
Sink = Annotated[
    str | None,
    _weights(
        "--sink",
        metavar="LIST",
        help="Where the bytes go: discard, land (in tensors on the device), write, verify. "
        "\\[default: discard,write; of resident weights discard,land]",
    ),
]
Cold = Annotated[
    bool,
    _weights(
        "--cold",
        metavar="",
        help="Before each run drop the source's files from the page cache, and check that.",
    ),
]
Directory = Annotated[
    str | None,
    _weights(
        "--dir",
        metavar="DIR",
        help="Directory for generated checkpoints. \\[default: /dev/shm if it has room, else "
        "the directory for temporary files]",
    ),
]
WriteDirectory = Annotated[
    str | None,
    _weights(
        "--write-dir", metavar="DIR", help="Directory for the sink `write`. \\[default: --dir]"
    ),
]

BufferSizes = Annotated[
    str,
    _sweep("--buffer-size", metavar="LIST", help="Most bytes in one broadcast; multiples of 1MiB."),
]
BufferCounts = Annotated[
    str, _sweep("--num-buffers", metavar="LIST", help="Buffers on each device.")
]
Readers = Annotated[
    str,
    _sweep("--readers", metavar="LIST", help="How many ranks read and send; `all` for every rank."),
]
Runs = Annotated[
    int, _sweep("--runs", metavar="N", min=1, max=10_000, help="Measured runs of each case.")
]
Warmup = Annotated[
    int,
    _sweep(
        "--warmup", metavar="N", min=0, max=1000, help="Runs of each case before those, to warm up."
    ),
]
NoBaselines = Annotated[bool, _sweep("--no-baselines", metavar="", help="Measure packcast only.")]
NoLimits = Annotated[
    bool, _sweep("--no-limits", metavar="", help="Do not measure the hardware's limits.")
]
NoCheck = Annotated[
    bool, _sweep("--no-check", metavar="", help="Do not compare the received bytes.")
]

Nproc = Annotated[
    int | None,
    option(
        "--nproc",
        panel=LAUNCH,
        metavar="N",
        min=2,
        help="Start N ranks on this machine. \\[default without a launcher: one per GPU, or 2]",
    ),
]
ExportJson = Annotated[
    str | None,
    _output(
        "--export-json",
        metavar="FILE|-",
        help="Write all results as JSON, with every run of every rank; again after each row.",
    ),
]
ExportCsv = Annotated[
    str | None, _output("--export-csv", metavar="FILE|-", help="Write a line per row.")
]
ExportMarkdown = Annotated[
    str | None, _output("--export-markdown", metavar="FILE|-", help="Write the table as markdown.")
]
Plot = Annotated[
    str | None,
    _output(
        "--plot",
        metavar="FILE.png|svg",
        help="Draw throughput against buffer size. Needs packcast\\[plot].",
    ),
]
MinBandwidth = Annotated[
    str | None,
    _output(
        "--min-bandwidth",
        metavar="RATE",
        help="Exit 5 unless the best row of each table reaches it, for example 10GB/s.",
    ),
]
Quiet = Annotated[
    bool, _output("--quiet", metavar="", short="-q", help="Only errors, and the final table.")
]
