"""What the ranks of a bench tell each other. Kinds 64 to 79 are the bench's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from packcast.control.messages import Message
from packcast.control.rank_info import Rank
from packcast.units import MIB

ShortText = Annotated[str, Field(max_length=255)]


class Begin(Message, kind=64, by="sender", limit=16 * MIB):
    """What every rank needs to know before there is a group."""

    settings: ShortText
    hosts: list[Rank]
    devices: list[ShortText]
    backend: Literal["nccl", "gloo"]
    host: ShortText
    port: Annotated[int, Field(ge=1, le=65535)]


class Did(Message, kind=65, by="worker"):
    """Every row is through on this rank."""


class Left(Message, kind=66, by="worker"):
    """The last word."""
