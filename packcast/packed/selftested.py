"""Kernels are used only after a self-test on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

K = TypeVar("K")


def self_tested(
    device: torch.device, load: Callable[[], K], is_right: Callable[[K, torch.device], bool]
) -> K | None:
    """The compiled kernel; None without a GPU or Triton, or if it fails its self-test.

    The first call on a device takes a second or two and waits for the device.
    """
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device):
            kernel = load()
            # Twice: the first launch compiles it, later ones take another way.
            return kernel if is_right(kernel, device) and is_right(kernel, device) else None
    except Exception:
        # Triton may find no C compiler, no cache directory or an unknown GPU, each with an error
        # of its own. Plain torch operations work in all these cases.
        return None
