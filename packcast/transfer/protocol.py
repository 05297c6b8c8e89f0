"""The messages of a transfer, in the order in which they are sent; kinds 32 to 63.

Those of the control channel itself, OFFER and COMMIT are in control/messages.py.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from packcast.control.messages import Message, Sentence
from packcast.control.rank_info import MAX_RANK, Rank
from packcast.units import KIB, MIB

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{1,128}$")]
CopyId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Inode = Annotated[int, Field(ge=0, lt=1 << 64)]
Nbytes = Annotated[int, Field(ge=0, le=1 << 63)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
NumRanks = Annotated[int, Field(ge=1, le=MAX_RANK + 1)]
ShortText = Annotated[str, Field(max_length=64)]


class RankAssignment(Message, kind=32, by="sender"):
    """The part of an offer for one rank alone: its device, and how many ranks share its host."""

    rank: Rank
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:(0|[1-9][0-9]?))\z")]
    ranks_on_host: NumRanks
    readers_on_host: NumRanks


class Prepared(Message, kind=33, by="worker"):
    """A worker's sink has its space: before READY.

    `copy_id` identifies the partial directory of its copy, `directory` is its device and inode if
    the worker can write into it; `owns`: this worker has made it.
    """

    copy_id: CopyId | None
    directory: tuple[Inode, Inode] | None
    owns: bool


class WritingShare(Message, kind=34, by="sender"):
    """The share that a worker writes of that directory, and how many ranks share it."""

    index: Rank
    count: NumRanks

    @model_validator(mode="after")
    def _check_index(self) -> Self:
        if self.index >= self.count:  # no rank would write its bytes
            raise ValueError(f"there is no share {self.index} of {self.count}")
        return self


class Ready(Message, kind=35, by="worker"):
    """A worker has its space and buffers, and this plan; `sums`: it needs sums of the chunks."""

    plan: Digest
    sums: bool


class Go(Message, kind=36, by="sender"):
    """All workers are ready: the address of the sender's store, and whether chunks carry sums."""

    host: Annotated[str, Field(pattern=r"^[0-9A-Za-z.:%_-]{1,255}$")]  # or an IPv6 with its scope
    port: Annotated[int, Field(ge=1, le=65535)]
    sums: bool


class Moved(Message, kind=37, by="worker"):
    """This worker has received every chunk."""


class Close(Message, kind=38, by="sender"):
    """All workers have received every chunk: close the process group."""


class StageFigures(BaseModel):
    """One stage, as a part of PROVED."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    nbytes: Nbytes
    seconds: Seconds
    waiting_seconds: Seconds


class Proved(Message, kind=39, by="worker", limit=16 * MIB):
    """Every byte was received, verified, and made durable, compared or dropped."""

    digests: Annotated[list[Digest], Field(max_length=100_000)] | None
    seconds: Seconds
    stages: Annotated[dict[ShortText, StageFigures], Field(max_length=16)]
    peak_device_bytes: Nbytes
    pinned_bytes: Nbytes
    device: ShortText
    pool: ShortText
    difference: Sentence | None


class Published(Message, kind=40, by="worker", limit=64 * KIB):
    """A worker's result; `code` is 0, or `error` says why it has no copy."""

    result: dict[str, JsonValue]
    code: Annotated[int, Field(ge=0, le=255)]
    error: Sentence | None
    hint: Sentence | None


class Done(Message, kind=41, by="sender", limit=64 * KIB):
    """The sender has every worker's PUBLISHED.

    `code` is not 0 if another rank was to publish this worker's copy, and has not.
    """

    code: Annotated[int, Field(ge=0, le=255)] = 0
    error: Sentence | None = None
    hint: Sentence | None = None
