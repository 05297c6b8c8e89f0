"""What sender and workers tell each other in the course of a transfer, as declared models.

In the order of DESIGN's protocol; control/messages.py has what precedes them, OFFER and COMMIT.
Kinds 32 to 63 are the transfer's.
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
ShortText = Annotated[str, Field(max_length=64)]


class RankAssignment(Message, kind=32, by="sender"):
    """What an offer says to one rank alone: its GPU, and with how many it shares its host."""

    rank: Rank
    device: ShortText
    ranks_on_host: Rank
    readers_on_host: Rank


class Prepared(Message, kind=33, by="worker"):
    """A worker's sink has its space: before READY. `copy_id` names the partial directory that its
    copy comes from, `directory` is its device and inode where the worker could write into it;
    `owns`: it has made that."""

    copy_id: CopyId | None
    directory: tuple[Inode, Inode] | None
    owns: bool


class WritingShare(Message, kind=34, by="sender"):
    """With how many ranks a worker shares the writing of that directory, and which share it has."""

    index: Rank
    count: Annotated[int, Field(ge=1, le=MAX_RANK + 1)]

    @model_validator(mode="after")
    def _check_index(self) -> Self:
        if self.index >= self.count:  # whose bytes nobody would write
            raise ValueError(f"there is no share {self.index} of {self.count}")
        return self


class Ready(Message, kind=35, by="worker"):
    """A worker has its space and buffers, and has made this plan; `sums`: it needs the chunks'."""

    plan: Digest
    sums: bool


class Go(Message, kind=36, by="sender"):
    """All ranks are ready: where the sender serves a store, and whether chunks carry sums."""

    host: Annotated[str, Field(pattern=r"^[0-9A-Za-z.:%_-]{1,255}$")]  # or an IPv6 with its scope
    port: Annotated[int, Field(ge=1, le=65535)]
    sums: bool


class Moved(Message, kind=37, by="worker"):
    """Every chunk is through on this rank."""


class Close(Message, kind=38, by="sender"):
    """Every chunk is through on every rank: the process group may go."""


class StageFigures(BaseModel):
    """What one stage did, as a part of PROVED."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    nbytes: Nbytes
    seconds: Seconds
    waiting_seconds: Seconds


class Proved(Message, kind=39, by="worker", limit=16 * MIB):
    """Every byte was received, proven, and made durable, compared or dropped."""

    digests: Annotated[list[Digest], Field(max_length=100_000)] | None
    seconds: Seconds
    stages: Annotated[dict[ShortText, StageFigures], Field(max_length=16)]
    peak_device_bytes: Nbytes
    pinned_bytes: Nbytes
    device: ShortText
    pool: ShortText
    difference: Sentence | None


class Published(Message, kind=40, by="worker", limit=64 * KIB):
    """What a worker has at the end, or why not; `code` is 0 then."""

    result: dict[str, JsonValue]
    code: Annotated[int, Field(ge=0, le=255)]
    error: Sentence | None
    hint: Sentence | None


class Done(Message, kind=41, by="sender", limit=64 * KIB):
    """Every worker has said what became of its copy; `code` is not 0 where another rank was to
    publish this one's, and has not."""

    code: Annotated[int, Field(ge=0, le=255)] = 0
    error: Sentence | None = None
    hint: Sentence | None = None
