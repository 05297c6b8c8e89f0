"""Checkpoints' dtypes beside torch's: those that this torch knows, and those that it does not."""

from __future__ import annotations

import torch

from tests.helpers.checkpoints import every_dtype

UNKNOWN_TO_TORCH = ["F4", "F6_E2M3", "F6_E3M2"]
if not hasattr(torch, "float8_e8m0fnu"):  # before torch 2.7
    UNKNOWN_TO_TORCH.append("F8_E8M0")


def every_torch_dtype() -> dict[str, tuple[str, tuple[int, ...]]]:
    """`every_dtype` that torch has, and a tensor of some MiB: more than small buffers hold."""
    tensors = {
        name: (dtype, shape)
        for name, (dtype, shape) in every_dtype().items()
        if dtype not in UNKNOWN_TO_TORCH
    }
    tensors["large"] = ("I16", (3, 1_000_001))
    return tensors
