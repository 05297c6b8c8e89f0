"""What a bench is asked and what it finds: plain data, no torch.

Between the command line (which makes BenchSettings and shows Results) and the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packcast.settings import (
    DEFAULT_HEARTBEAT_TIMEOUT_S,
    DEFAULT_JOIN_TIMEOUT_S,
    DEFAULT_STAGING,
    DEFAULT_STALL_TIMEOUT_S,
    Backend,
)
from packcast.units import format_exact_size

ShapeKind = Literal["dense", "moe", "tiny"]
SourceKind = Literal["file", "resident"]
BenchSink = Literal["discard", "land", "write", "verify"]
# `packcast` is `send` for a file and a replay for resident weights; `compat` the library functions;
# `chain` and `gloo broadcast` move chunk after chunk over CPUs and do nothing else.
# `limit` is the hardware's, of the stage or stages that `Case.limit` names.
Method = Literal[
    "packcast", "compat", "chain", "gloo broadcast", "original", "per-tensor", "load_file", "limit"
]
OURS: tuple[Method, ...] = ("packcast", "compat")
LimitStage = Literal["read", "h2d", "broadcast", "d2h", "write", "together"]
SENDER = 0  # every rank runs the same command, so the lowest one sends


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """One run of `packcast bench`, the same on every rank. Sizes in bytes, times in seconds.

    The sweep is the product of shapes (or the checkpoint), sources, sinks, readers, buffer sizes
    and counts, as far as they go together. `directory` is where generated checkpoints are made and
    `write_directory` where the `write` sink writes, in directories of the bench's own, which it
    removes again.
    """

    checkpoint: Path | None
    shapes: tuple[ShapeKind, ...]
    size: int
    sources: tuple[SourceKind, ...]
    sinks: tuple[BenchSink, ...]
    readers: tuple[int | None, ...]  # None: all
    buffer_sizes: tuple[int, ...]
    num_buffers: tuple[int, ...]
    runs: int
    warmup: int
    directory: Path
    write_directory: Path
    cold: bool = False
    check: bool = True
    baselines: bool = True
    limits: bool = True
    staging: int = DEFAULT_STAGING
    backend: Backend = "auto"
    device: str = "auto"
    port: int | None = None
    port_range: range | None = None
    token: bytes | None = None
    join_timeout_s: float = DEFAULT_JOIN_TIMEOUT_S
    heartbeat_timeout_s: float = DEFAULT_HEARTBEAT_TIMEOUT_S
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row to measure: a method over one combination of the sweep.

    `is_default`: what somebody gets who says nothing of buffers and readers.
    """

    method: Method
    shape: str  # a ShapeKind, or the checkpoint's name
    source: SourceKind
    sink: BenchSink
    readers: int = 1  # already counted: `all` is the world size
    buffer_size: int = 0
    num_buffers: int = 0
    is_default: bool = False
    limit: LimitStage | None = None

    @property
    def combination(self) -> tuple[str, str, str]:
        """Rows of one combination are compared with each other."""
        return self.shape, self.source, self.sink

    @property
    def buffers(self) -> str:
        """`64MiB x 4`, or a dash."""
        if not self.num_buffers:
            return "-"
        return f"{format_exact_size(self.buffer_size)} x {self.num_buffers}"

    def __str__(self) -> str:
        readers = f", {self.readers} readers" if self.readers > 1 else ""
        buffers = f" {self.buffers}" if self.num_buffers else ""
        method = f"limit of {self.limit}," if self.limit else self.method
        return f"{method} {self.shape} {self.source}->{self.sink}{buffers}{readers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One rank's part in one run. `seconds` from the common start until this rank was done.

    `waiting` is how long its loop stood still for each stage; with resident weights, whose loop
    never waits beside a GPU, how long each stage was busy. `loop_seconds` is the CPU time of the
    loop's thread. `sent_nbytes` are the bytes that this rank gave to others, where that is known.
    `wrong` counts blocks (files) or tensors that are not the sender's; None: not checked.
    """

    rank: int
    seconds: float
    wrong: int | None = 0
    waiting: Mapping[str, float] = field(default_factory=dict)
    loop_seconds: float = 0.0
    sent_nbytes: int | None = None
    peak_device_nbytes: int = 0
    peak_pinned_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a case on all ranks, in the order in which runs were made."""

    ranks: tuple[RankRun, ...]
    is_warmup: bool = False

    @property
    def seconds(self) -> float:
        """The slowest rank's."""
        return max(part.seconds for part in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What the hardware does without packcast, measured on the same ranks in the same bench.

    `bytes_per_second` is of the checkpoint's bytes: with two readers at once, what both read
    together. `detail` says how it was reached ("16 threads").
    """

    stage: LimitStage
    bytes_per_second: float
    detail: str = ""
    buffer_size: int | None = None  # of a broadcast in calls of this size
    readers: int | None = None
    sink: BenchSink | None = None  # of `together`, as is `shape`
    shape: str | None = None

    @property
    def label(self) -> str:
        """`broadcast, 64MiB per call`, `read, 2 readers`."""
        words: list[str] = [self.stage]
        if self.sink is not None:
            words.append(f"{self.shape}, file to {self.sink}")
        if self.buffer_size is not None:
            words.append(f"{format_exact_size(self.buffer_size)} per call")
        if self.readers is not None and self.readers > 1:
            words.append(f"{self.readers} readers")
        return ", ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case with its runs so far, or with the `failure` that kept it from being measured.

    `nbytes` is the size of the checkpoint or the weights. `limit` is the one that binds it.
    """

    case: Case
    nbytes: int
    runs: tuple[Run, ...] = ()
    failure: str | None = None
    limit: Limit | None = None
    is_complete: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where it was measured: JSON-able facts, for the header and the export."""

    versions: Mapping[str, str]  # packcast, python, torch, nccl, cuda, kernel, ...
    backend: str
    world_size: int
    ranks: tuple[Mapping[str, object], ...]  # rank, host, device, GPU's name, cores, I/O threads
    file_systems: Mapping[str, str]  # directory -> tmpfs, ext4, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was found so far. `exit_code` is None while the bench runs."""

    command_line: str = ""
    environment: Environment | None = None
    num_cases: int = 0
    rows: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()
    exit_code: int | None = None
    error: str | None = None


class BenchView:
    """Whoever watches a bench, on the sender only; this one shows nothing."""

    def doing(self, text: str, share_done: float) -> None:
        """What is measured now, and how much of the sweep is over (0 to 1)."""

    def found(self, results: Results, news: Row | None = None) -> None:
        """All that is known by now; `news` is the row that is complete now."""
