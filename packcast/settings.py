"""What a user asked for, typed and checked: plain data between the command line and the transfer.

Knows no torch, no files' contents and no command line library.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packcast.units import MIB

SinkKind = Literal["write", "verify", "discard"]
Backend = Literal["auto", "nccl", "gloo"]

DEFAULT_BUFFER_SIZE = 16 * MIB
DEFAULT_NUM_BUFFERS = 4
DEFAULT_STAGING = 512 * MIB
DEFAULT_JOIN_TIMEOUT_S = 300.0
DEFAULT_HEARTBEAT_TIMEOUT_S = 3.0
DEFAULT_STALL_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of `packcast send` or `packcast recv` on one rank.

    Sizes in bytes, times in seconds. What only the sender decides (buffers, readers, selection)
    is ignored on the others: it reaches them with the offer.
    """

    command: Literal["send", "recv"]
    checkpoint: Path | None = None
    sink: SinkKind = "discard"
    target: str | None = None  # --out or --verify, with {rank}, {local_rank}, {host} still in it
    force: bool = False
    sidecars: bool = True
    all_files: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    readers: int | None = 1  # None: all
    buffer_size: int = DEFAULT_BUFFER_SIZE
    num_buffers: int = DEFAULT_NUM_BUFFERS
    staging: int = DEFAULT_STAGING
    backend: Backend = "auto"
    device: str = "auto"
    workers: int | None = None  # no launcher: how many `recv` will come
    address: tuple[str, int] | None = None  # no launcher: --listen, or recv's HOST:PORT
    port: int | None = None  # Slurm: the store's port, instead of the derived one
    token: bytes | None = None
    rank: int | None = None  # no launcher: recv --rank
    join_timeout_s: float = DEFAULT_JOIN_TIMEOUT_S
    heartbeat_timeout_s: float = DEFAULT_HEARTBEAT_TIMEOUT_S
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S


def fill_in(template: str, *, rank: int, local_rank: int, host: str) -> str:
    """`{rank}`, `{local_rank}` and `{host}` in a path, once they are known."""
    for name, value in (("rank", rank), ("local_rank", local_rank), ("host", host)):
        template = template.replace("{" + name + "}", str(value).replace(os.sep, "_"))
    return template
