"""A tensor subclass whose value is not in memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Wrapper(torch.Tensor):
    """What quantized and sharded tensors of other libraries are: a shape around other tensors."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        plain = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        return func(*plain, **(kwargs or {}))
