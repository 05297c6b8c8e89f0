"""One process of a transfer, as it introduces itself to the others.

It comes from the network, so it is a model with bounds: every instance has been validated.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from packcast.io.memory import MAX_LIMITS, MemoryLimit

Role = Literal["send", "recv"]

MAX_RANK = 1_000_000
MAX_NAME_LENGTH = 255
MAX_PATH_LENGTH = 4096
MAX_GPUS = 64
MAX_LIMIT_LENGTH = 512
MAX_NBYTES = 1 << 63


def printable(text: str) -> str:
    """The text with unprintable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check_printable(text: str) -> str:
    """For a model's field: ValueError unless the text is printable."""
    if not text.isprintable():
        raise ValueError("it is not printable")
    return text


def _check_limit(limit: MemoryLimit) -> MemoryLimit:
    for text in (limit.key, limit.name):
        check_printable(text)
        if len(text) > MAX_LIMIT_LENGTH:
            raise ValueError("it is too long")
    if not 0 <= limit.free <= MAX_NBYTES:
        raise ValueError("it is no number of bytes")
    return limit


Limit = Annotated[MemoryLimit, AfterValidator(_check_limit)]
Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH), AfterValidator(check_printable)]
Rank = Annotated[int, Field(ge=0, le=MAX_RANK)]
Nbytes = Annotated[int, Field(ge=0, le=MAX_NBYTES)]


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class RankInfo:
    """A rank's host, process and devices, and the checkpoint that it can send.

    `boot_id` identifies the host; names may be equal. `gpus` are the ids of the visible GPUs in
    order, `gpu_free` their free bytes as far as they are known; `memory` is what limits leave of
    the host's. `device` is the requested one (`auto`, `cpu`, `cuda`, `cuda:1`). `checkpoint` (its
    real path) and `fingerprint` are set if the rank ran `send`. `rank` is None until assigned.
    """

    role: Role
    rank: Rank | None
    host: Name
    boot_id: Name
    pid: Annotated[int, Field(ge=0, le=1 << 31)]
    local_rank: Rank | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)\z")] = "auto"
    gpus: Annotated[tuple[Name, ...], Field(max_length=MAX_GPUS)] = ()
    gpu_free: Annotated[tuple[Nbytes | None, ...], Field(max_length=MAX_GPUS)] = ()
    memory: Annotated[tuple[Limit, ...], Field(max_length=MAX_LIMITS)] = ()
    checkpoint: (
        Annotated[str, Field(max_length=MAX_PATH_LENGTH), AfterValidator(check_printable)] | None
    ) = None
    fingerprint: Name | None = None

    @property
    def known_rank(self) -> int:
        """`rank`, once it is certain that there is one."""
        assert self.rank is not None
        return self.rank

    @property
    def label(self) -> str:
        """`rank 3 (host-b, pid 4711)`."""
        name = "a worker" if self.rank is None else f"rank {self.rank}"
        return f"{name} ({self.host}, pid {self.pid})"
