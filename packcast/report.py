"""The result of a transfer on one rank: plain data.

Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from packcast.comparison import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank of the group; `ok` is None if it is not known how it ended."""

    rank: int
    role: Literal["sender", "worker"]
    host: str
    device: str
    ok: bool | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StageReport:
    """A stage's bytes, the seconds spent in it, and the seconds others spent waiting for it."""

    nbytes: int
    seconds: float
    waiting_seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Zero where nothing was measured."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of `packcast send` or `packcast recv` on one rank.

    The sender's covers the whole group, a worker's itself. Sizes in bytes. `rank` is this
    process's own, None where it failed before it had one. `workers` holds small JSON-able facts
    per rank, such as where it wrote; `digests` maps a file's logical name to its hex digest. The
    peaks count packcast's own memory: not the caller's model, nor tensors that were received.
    """

    command: Literal["send", "recv"]
    rank: int | None = None
    is_sender: bool = False
    ok: bool = True
    exit_code: int = 0
    error: str | None = None
    hint: str | None = None
    checkpoint: str | None = None  # where it is, on a rank that sends it
    num_files: int = 0
    num_tensors: int = 0
    nbytes: int = 0
    backend: str | None = None
    reason: str | None = None  # why this backend
    world_size: int | None = None
    ranks: tuple[RankReport, ...] = ()
    buffer_size: int = 0
    num_buffers: int = 0
    staging: int = 0
    pool: str | None = None  # which I/O threads: native or python
    seconds: float = 0.0
    stages: Mapping[str, StageReport] = field(default_factory=dict)
    peak_device_nbytes: int = 0
    peak_pinned_nbytes: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)
    workers: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    comparison: Comparison | None = None  # of a worker that has compared
    warnings: tuple[str, ...] = ()
    started: str | None = None  # when the command was, as ISO 8601 in UTC; None in a library call
    total_seconds: float = 0.0  # of the whole command, with its start; 0 in a library call
    ends_cleanly: bool = True  # False: a thread is stuck in torch; leave by os._exit

    @property
    def bytes_per_second(self) -> float:
        """Of the whole checkpoint, once, over the whole time; zero where nothing was measured."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def digest(self) -> str | None:
        """One for the whole checkpoint: SHA-256 over the names and digests of its files."""
        if not self.digests:
            return None
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 1-8, 11`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"rank {text}" if one else f"ranks {text}"
