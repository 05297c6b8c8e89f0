"""A kernel is used where it has been tried out; what it is for is its user's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

K = TypeVar("K")


def self_tested(
    device: torch.device, load: Callable[[], K], is_right: Callable[[K, torch.device], bool]
) -> K | None:
    """The kernel, compiled and tried out; None where there is no GPU, no Triton, or it fails.

    The first call on a device takes a second or two and waits for the device.
    """
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device):
            kernel = load()
            return kernel if is_right(kernel, device) else None
    except Exception:
        # Triton fails in ways of its own: no C compiler, no folder for its cache, a GPU that it
        # does not know. Plain torch operations are there for all of them.
        return None
