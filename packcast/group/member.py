"""One process of a transfer, as it introduces itself to the others. Pure data.

What comes from the wire is hostile: `Member.from_json` takes nothing that it has not checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["send", "recv"]
ROLES: dict[str, Role] = {"send": "send", "recv": "recv"}

MAX_RANK = 1_000_000
MAX_NAME_LENGTH = 255
MAX_PATH_LENGTH = 4096
MAX_GPUS = 64
MAX_EXTRA_NBYTES = 4096
MAX_GPU_ID_LENGTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank's introduction: where it runs, and what it brings along.

    `boot_id` tells hosts apart where names do not. `gpus` are the ids of the visible GPUs in
    order, `device` is the wish (`auto`, `cpu`, `cuda`, `cuda:1`). `checkpoint` (its real path) and
    `fingerprint` are set where the rank ran `send`. `rank` is None until the sender gives one out.
    """

    role: Role
    rank: int | None
    host: str
    boot_id: str
    pid: int
    local_rank: int | None = None
    device: str = "auto"
    gpus: tuple[str, ...] = ()
    checkpoint: str | None = None
    fingerprint: str | None = None
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`rank 3 (host-b, pid 4711)`."""
        name = "a worker" if self.rank is None else f"rank {self.rank}"
        return f"{name} ({self.host}, pid {self.pid})"

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; the inverse of `from_json`, but for what cannot be printed."""
        return {
            "role": self.role,
            "rank": self.rank,
            "host": printable(self.host),
            "boot_id": self.boot_id,
            "pid": self.pid,
            "local_rank": self.local_rank,
            "device": self.device,
            "gpus": list(self.gpus),
            "checkpoint": None if self.checkpoint is None else printable(self.checkpoint),
            "fingerprint": self.fingerprint,
            "extra": self.extra,
        }

    @staticmethod
    def from_json(value: object) -> Member:
        """The member that a peer's message describes; raises ValueError if any field is amiss."""
        if not isinstance(value, dict):
            raise ValueError("a member is not an object")
        role = ROLES.get(_text(value, "role", 8))
        if role is None:
            raise ValueError("role is neither send nor recv")
        return Member(
            role=role,
            rank=_optional_count(value, "rank", MAX_RANK),
            host=_text(value, "host", MAX_NAME_LENGTH),
            boot_id=_text(value, "boot_id", MAX_NAME_LENGTH),
            pid=_count(value, "pid", 1 << 31),
            local_rank=_optional_count(value, "local_rank", MAX_RANK),
            device=_text(value, "device", 32),
            gpus=_gpus(value),
            checkpoint=_optional_text(value, "checkpoint", MAX_PATH_LENGTH),
            fingerprint=_optional_text(value, "fingerprint", MAX_NAME_LENGTH),
            extra=_extra(value),
        )


def printable(text: str) -> str:
    """The text on one line, escaped where a terminal would act on it or could not show it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _text(value: dict[str, object], key: str, limit: int) -> str:
    text = value.get(key)
    if not isinstance(text, str) or len(text) > limit or not text.isprintable():
        raise ValueError(f"{key} is not a short printable text")
    return text


def _optional_text(value: dict[str, object], key: str, limit: int) -> str | None:
    return None if value.get(key) is None else _text(value, key, limit)


def _count(value: dict[str, object], key: str, limit: int) -> int:
    number = value.get(key)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= limit:
        raise ValueError(f"{key} is not a number from 0 to {limit}")
    return number


def _optional_count(value: dict[str, object], key: str, limit: int) -> int | None:
    return None if value.get(key) is None else _count(value, key, limit)


def _gpus(value: dict[str, object]) -> tuple[str, ...]:
    gpus = value.get("gpus")
    if not isinstance(gpus, list) or len(gpus) > MAX_GPUS:
        raise ValueError("gpus is not a short list")
    return tuple(_text({"gpus": gpu}, "gpus", MAX_GPU_ID_LENGTH) for gpu in gpus)


def _extra(value: dict[str, object]) -> dict[str, object]:
    extra = value.get("extra")
    try:
        small = isinstance(extra, dict) and len(json.dumps(extra)) <= MAX_EXTRA_NBYTES
    except RecursionError:
        small = False
    if not small or not isinstance(extra, dict):
        raise ValueError("extra is not a small object")
    return extra
