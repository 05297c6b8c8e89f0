"""The interface of a display: a transfer calls it, and its methods do nothing here.

A display subclasses View. Methods are called on the thread of the transfer (the main thread of a
command, a thread of its own in a library call) unless they say otherwise; `close` by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["load", "join", "offer", "start", "data", "finish", "publish", "done"]


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker's newest heartbeat said: bytes it has written or checked, and the stage that
    its loop waits for ("broadcast" is bytes from others; "sync" makes the copy durable)."""

    nbytes: int
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The progress of this rank; may be read at any time from any thread.

    `nbytes_done` is what is through everywhere, as far as this rank knows: on the sender that of
    the slowest worker. `stages` maps a stage (read, h2d, broadcast, d2h, write, verify, discard) to
    bytes so far on this rank. `workers` are by rank, on the sender only.
    """

    nbytes_done: int
    nbytes_total: int
    stages: dict[str, int]
    workers: dict[int, WorkerState]
    stage: str = ""  # that this rank waits for; "limit" is --max-rate


@dataclass(frozen=True, slots=True)
class Joining:
    """The workers that have joined; the sender waits until `deadline` (`time.monotonic()`)."""

    joined: int
    wanted: int
    missing: tuple[int, ...]  # ranks, if a launcher has assigned them; on a worker the first 8
    newest: str | None  # label of the last one to come; on the sender
    deadline: float
    newest_host: str | None = None  # likewise


@dataclass(frozen=True, slots=True)
class Start:
    """The start line: what is sent, to which ranks, over which backend and why."""

    rank: int
    is_sender: bool
    num_files: int
    num_tensors: int
    nbytes: int
    world_size: int
    readers: tuple[int, ...]
    backend: str
    device: str
    reason: str  # why this backend
    loud: bool  # GPUs are there and not used
    buffer_size: int
    num_buffers: int
    staging: int
    pool: str  # which I/O threads: native or python
    hosts: Mapping[int, str] = field(default_factory=dict)  # of each rank; on the sender only
    is_low: bool = False  # smaller buffers than with more memory; on the sender only


class View:
    """The display's interface; this one shows nothing."""

    def listening(self, recv_line: str) -> None:
        """No launcher: the exact `packcast recv ...` line to run on each worker."""

    def joining(self, joining: Joining) -> None:
        """Workers are waited for: at first, and again as they come."""

    def warn(self, text: str) -> None:
        """Something to know that stops nothing (also from the control thread)."""

    def note(self, text: str) -> None:
        """Something on the way that is no cause for worry, as that the sender is waited for."""

    def placed(self, rank: int, *, is_sender: bool) -> None:
        """This process has learned its part; its rank may still change without a launcher."""

    def phase(self, phase: Phase) -> None:
        """The transfer has entered this phase."""

    def started(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        """Bytes are about to move; `progress` may be polled until `close`."""

    def close(self) -> None:
        """Nothing more will come; restore the terminal. Idempotent, from any thread."""
