"""The settings and the results of a bench: plain data, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packcast.settings import Settings
from packcast.units import GIB, format_exact_size

ShapeKind = Literal["dense", "moe", "tiny"]
SourceKind = Literal["file", "resident"]
BenchSink = Literal["discard", "land", "write", "verify"]
# `packcast` is `send` for files and a replay for resident weights; `compat` the library functions;
# `chain` and `gloo broadcast` only move chunks over CPUs; `limit` measures `Case.limit`.
Method = Literal[
    "packcast", "compat", "chain", "gloo broadcast", "original", "per-tensor", "load_file", "limit"
]
OURS: tuple[Method, ...] = ("packcast", "compat")
LimitStage = Literal["read", "h2d", "broadcast", "d2h", "write", "together"]
SENDER = 0  # every rank runs the same command, and the lowest one sends


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """One run of `packcast bench`, the same on every rank. Sizes in bytes.

    The sweep is the product of shapes (or the checkpoint), sources, sinks, readers, buffer sizes
    and counts, without the combinations that make no sense. Generated checkpoints are made in
    `directory`, copies in `write_directory`, and removed at the end. `transfer` has the checkpoint
    if one is given, the staging size, and how the ranks meet.
    """

    transfer: Settings
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

    @property
    def checkpoint(self) -> Path | None:
        return self.transfer.checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one row measures: a method with one combination of the sweep.

    `is_default` marks the buffers and readers that a user gets without options.
    """

    method: Method
    shape: str  # a ShapeKind, or the checkpoint's name
    source: SourceKind
    sink: BenchSink
    readers: int = 1
    buffer_size: int = 0
    num_buffers: int = 0
    is_default: bool = False
    limit: LimitStage | None = None

    @property
    def combination(self) -> tuple[str, str, str]:
        """Rows with the same combination are one table and are compared with each other."""
        return self.shape, self.source, self.sink

    @property
    def buffers(self) -> str:
        """`64MiB x 4`, or a dash."""
        if not self.num_buffers:
            return "-"
        return f"{format_exact_size(self.buffer_size)} x {self.num_buffers}"

    @property
    def more_readers(self) -> str:
        """`, 2 readers`; empty for one."""
        return f", {self.readers} readers" if self.readers > 1 else ""

    def __str__(self) -> str:
        buffers = f" {self.buffers}" if self.num_buffers else ""
        method = f"limit of {self.limit}," if self.limit else self.method
        return f"{method} {self.shape} {self.source}->{self.sink}{buffers}{self.more_readers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One rank's part in one run. `seconds` are from the common start to this rank's end.

    `waiting` is how long its loop waited for each stage; for resident weights on a GPU, where the
    loop does not wait, how long each stage was busy. `loop_seconds` is the loop's CPU time.
    `sent_nbytes` is what this rank sent to others, where that is known. `wrong` counts blocks or
    tensors that differ from the sender's; None: not checked.
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
    """One run of a case on all ranks."""

    ranks: tuple[RankRun, ...]
    is_warmup: bool = False

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return max(part.seconds for part in self.ranks)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of the runs that count. `cv` is the sample's standard deviation over its mean."""

    median: float
    min: float
    max: float
    cv: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What the hardware does without packcast, measured on the same ranks in the same bench.

    `bytes_per_second` counts the checkpoint's bytes, so two readers add up. A broadcast has a
    `buffer_size`; only `together` has `sink` and `shape`.
    """

    stage: LimitStage
    bytes_per_second: float
    detail: str
    buffer_size: int | None
    readers: int | None
    sink: BenchSink | None
    shape: str | None

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

    `nbytes` is the size of the checkpoint or the weights; `limit` the one that applies to the row.
    """

    case: Case
    nbytes: int
    runs: tuple[Run, ...] = ()
    failure: str | None = None
    limit: Limit | None = None
    is_complete: bool = False

    @property
    def steady(self) -> tuple[Run, ...]:
        """The runs after the warm-up."""
        return tuple(run for run in self.runs if not run.is_warmup)

    @property
    def parts(self) -> list[RankRun]:
        """Every rank's part in every run, warm-up included."""
        return [part for run in self.runs for part in run.ranks]

    @property
    def seconds(self) -> Seconds | None:
        """None where the row has not been measured."""
        times = [run.seconds for run in self.steady]
        if not times or self.failure is not None:
            return None
        spread = statistics.stdev(times) if len(times) > 1 else 0.0
        median = statistics.median(times)
        return Seconds(median, min(times), max(times), spread / statistics.fmean(times))

    @property
    def rate(self) -> float | None:
        """Bytes per second of the median run."""
        seconds = self.seconds
        return self.nbytes / seconds.median if seconds else None

    @property
    def fraction(self) -> float | None:
        """The part of its limit that the row reached."""
        rate = self.rate
        return rate / self.limit.bytes_per_second if self.limit and rate else None

    @property
    def wrong(self) -> int | None:
        """The most of any run, warm-up included."""
        if any(part.wrong is None for run in self.runs for part in run.ranks):
            return None
        return max((sum(part.wrong or 0 for part in run.ranks) for run in self.runs), default=0)

    @property
    def loop_seconds_per_gib(self) -> float | None:
        """CPU time of the sender's loop; None where no loop was counted."""
        times = [run.ranks[SENDER].loop_seconds for run in self.steady]
        median = statistics.median(times) if times else 0.0
        return median / (self.nbytes / GIB) if median and self.nbytes else None

    @property
    def most_sent(self) -> float | None:
        """The most bytes that any rank sent to others, as a multiple of the weights."""
        counts = [part.sent_nbytes for run in self.steady for part in run.ranks]
        known = [nbytes for nbytes in counts if nbytes is not None]
        return max(known) / self.nbytes if known and self.nbytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where the bench ran: JSON-able facts, for the header and the export."""

    versions: Mapping[str, str]  # packcast, python, torch, nccl, cuda, kernel, ...
    backend: str
    world_size: int
    ranks: tuple[Mapping[str, object], ...]  # rank, host, device, GPU's name, cores, I/O threads
    file_systems: Mapping[str, str]  # directory -> tmpfs, ext4, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All results so far. `exit_code` is None while the bench runs."""

    command_line: str = ""
    environment: Environment | None = None
    num_cases: int = 0
    rows: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()
    exit_code: int | None = None
    error: str | None = None


class BenchView:
    """The display's interface, called on the sender only; this one shows nothing."""

    def doing(self, text: str, share_done: float) -> None:
        """What is measured now, and the share of the sweep that is done (0 to 1)."""

    def found(self, results: Results, news: Row | None = None) -> None:
        """All results so far; `news` is a row that has just been completed."""
