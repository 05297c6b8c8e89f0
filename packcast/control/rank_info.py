"""One process of a transfer, as it introduces itself to the others. Pure data.

It comes from the network: a model with bounds, so that an instance is always one that was checked.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

Role = Literal["send", "recv"]

MAX_RANK = 1_000_000
MAX_NAME_LENGTH = 255
MAX_PATH_LENGTH = 4096
MAX_GPUS = 64


def printable(text: str) -> str:
    """The text on one line, escaped where a terminal would act on it or could not show it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check_printable(text: str) -> str:
    """For a model's field: ValueError unless the text is printable."""
    if not text.isprintable():
        raise ValueError("it is not printable")
    return text


Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH), AfterValidator(check_printable)]
Rank = Annotated[int, Field(ge=0, le=MAX_RANK)]


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class RankInfo:
    """A rank's introduction: where it runs, and what it brings along.

    `boot_id` tells hosts apart where names do not. `gpus` are the ids of the visible GPUs in
    order, `device` is the wish (`auto`, `cpu`, `cuda`, `cuda:1`). `checkpoint` (its real path) and
    `fingerprint` are set where the rank ran `send`. `rank` is None until the sender gives one out.
    """

    role: Role
    rank: Rank | None
    host: Name
    boot_id: Name
    pid: Annotated[int, Field(ge=0, le=1 << 31)]
    local_rank: Rank | None = None
    device: Annotated[str, Field(max_length=32), AfterValidator(check_printable)] = "auto"
    gpus: Annotated[tuple[Name, ...], Field(max_length=MAX_GPUS)] = ()
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
