"""Kernels are used only after a self-test on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from packcast.errors import first_line

K = TypeVar("K")

faults: list[str] = []  # why kernels are not used on a GPU of this process


def self_tested(
    device: torch.device, load: Callable[[], K], is_right: Callable[[K, torch.device], bool]
) -> K | None:
    """The compiled kernel; None without a GPU or Triton, or if it fails its self-test.

    The first call on a device takes a second or two and waits for the device. On a GPU it logs why
    there is no kernel, once for each reason: sums and small tensors then take many times as long.
    """
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device):
            kernel = load()
            # Twice: the first launch compiles it, later ones take another way.
            if is_right(kernel, device) and is_right(kernel, device):
                return kernel
            _report("they fail their self-test")
    except Exception as error:
        # Triton may find no C compiler (it uses CC), no cache directory or an unknown GPU, each
        # with an error of its own. Plain torch operations work in all these cases.
        _report(first_line(error))
    return None


def _report(reason: str) -> None:
    if reason in faults:
        return
    faults.append(reason)
    logging.getLogger("packcast").warning(
        "packcast: no GPU kernels, so sums and small tensors take many times as long: %s", reason
    )
