"""What the ranks of a bench tell each other. Kinds 64 to 79 are the bench's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from packcast.control.messages import Message
from packcast.group.rank_info import Rank
from packcast.units import KIB, MIB

Answer = dict[str, object]  # of one rank
ShortText = Annotated[str, Field(max_length=255)]


class Begin(Message, kind=64, by="sender", limit=16 * MIB):
    """What every rank needs to know before there is a group."""

    settings: ShortText
    hosts: list[Rank]
    devices: list[ShortText]
    backend: Literal["nccl", "gloo"]
    sender: Rank
    host: ShortText
    port: Annotated[int, Field(ge=1, le=65535)]


class Do(Message, kind=65, by="sender", limit=16 * MIB):
    """One step, for all ranks at once."""

    step: ShortText
    fields: dict[str, Any] = Field(default_factory=dict)

    def as_order(self) -> dict[str, Any]:
        """Step and fields together."""
        return {"step": self.step, **self.fields}


class Did(Message, kind=66, by="worker", limit=64 * KIB):
    """What a step has found on one rank."""

    answer: dict[str, Any] = Field(default_factory=dict)


class Left(Message, kind=67, by="worker"):
    """The last word."""
