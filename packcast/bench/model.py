"""What a bench is asked, what it measures and what it finds: plain data, no torch.

Between the command line (which makes BenchSettings and shows a BenchReport) and the ranks.
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

ShapeKind = Literal["dense", "moe", "tiny"]
SourceKind = Literal["file", "resident"]
BenchSink = Literal["discard", "land", "write", "verify"]
# `packcast` is `send` for a file and a replay for resident weights; `compat` the library functions.
Method = Literal[
    "packcast",
    "compat",
    "original",
    "per-tensor",
    "load_file",
    "instanttensor",
    "fastsafetensors",
]
# `together`: all stages of a row from files at the same time, which share a machine.
LimitStage = Literal["read", "h2d", "broadcast", "d2h", "write", "together"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """One run of `packcast bench`, the same on every rank. Sizes in bytes, times in seconds.

    The sweep is the product of shapes (or the checkpoint), sources, sinks, readers, buffer sizes
    and counts, as far as they go together. `directory` is where generated checkpoints are made and
    the `write` sink writes, in directories of the bench's own, which it removes again.
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
    token: bytes | None = None
    join_timeout_s: float = DEFAULT_JOIN_TIMEOUT_S
    heartbeat_timeout_s: float = DEFAULT_HEARTBEAT_TIMEOUT_S
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row to measure: a method over one combination of the sweep."""

    method: Method
    shape: str  # a ShapeKind, or the checkpoint's name
    source: SourceKind
    sink: BenchSink
    readers: int  # already counted: `all` is the world size
    buffer_size: int
    num_buffers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One rank's part in one run. `seconds` from the common start until this rank was done.

    `waiting` is how long its loop stood still for each stage, `busy` each stage's first beginning
    to its last end. With resident weights the loop never waits beside a GPU: there `waiting` is how
    long the lanes were busy with each stage, and `busy` is empty. `loop_seconds` is the CPU time of
    the loop's thread. `wrong` counts blocks (files) or tensors that are not the sender's.
    """

    rank: int
    seconds: float
    wrong: int = 0
    waiting: Mapping[str, float] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)
    loop_seconds: float = 0.0
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
    """What the hardware does without packcast, measured on the same ranks at the same time.

    `bytes_per_second` is of the checkpoint's bytes: with two readers at once, what both read
    together. `detail` says how it was reached ("16 threads").
    """

    stage: LimitStage
    bytes_per_second: float
    detail: str = ""
    buffer_size: int | None = None  # of a broadcast in calls of this size; None: 1 GiB per call
    readers: int | None = None
    sink: BenchSink | None = None  # of `together`
    per_rank: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the ranks give for a case: its runs, or why there are none.

    `nbytes` is the checkpoint's or the weights' size. `limits` are those that bear on this case.
    """

    case: Case
    nbytes: int
    runs: tuple[Run, ...] = ()
    limits: tuple[Limit, ...] = ()
    sender: int = 0
    failure: str | None = None  # as "no room for 4 buffers of 16 GiB"; the sweep goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where it was measured: JSON-able facts, for the header and the export."""

    versions: Mapping[str, str]  # packcast, python, torch, nccl, cuda, kernel, ...
    backend: str
    world_size: int
    ranks: tuple[Mapping[str, object], ...]  # rank, host, device, gpu name, cores
    file_systems: Mapping[str, str] = field(default_factory=dict)  # directory -> tmpfs, ext4, ...


class BenchView:
    """What a bench tells whoever watches it, on the sender only; this one shows nothing."""

    def environment(self, environment: Environment, num_cases: int) -> None:
        """All ranks are there; this many cases will be measured."""

    def limit(self, limit: Limit) -> None:
        """One limit is known."""

    def begun(self, case: Case, run: int, runs: int) -> None:
        """A run of a case begins; `run` counts from 0, warm-up included in `runs`."""

    def measured(self, measured: Measured) -> None:
        """A case is over, or was found impossible."""

    def warn(self, text: str) -> None:
        """Something to know that stops nothing."""

    def close(self) -> None:
        """Nothing more will come; restore the terminal. Idempotent, from any thread."""
