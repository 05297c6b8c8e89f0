"""Stands in for the loader of this name: it wants what the real one wants, and fails as that does.

Not its way of reading: each tensor is read by one rank and broadcast.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from safetensors import safe_open as open_shard


class BackendPolicy(enum.Enum):
    BUFFERED = "BUFFERED"


class safe_open:
    def __init__(
        self,
        filename: list[str],
        framework: str,
        device: torch.device,
        process_group: dist.ProcessGroup | None = None,
        *,
        copy: bool = True,
        backend: BackendPolicy | None = None,
    ) -> None:
        filename.sort()
        self._files, self._device, self._group = filename, torch.device(device), process_group
        self._world_size = dist.get_world_size(process_group)
        self._rank = dist.get_rank(process_group)
        assert (framework, copy) == ("pt", True)
        budget = torch.tensor([self._rank], device=self._device)
        dist.all_reduce(budget, op=dist.ReduceOp.MIN, group=process_group)
        assert budget.item() == 0
        # Which reads is the file system's to say; the tests' files are not all on one.
        assert backend in (None, BackendPolicy.BUFFERED)

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *_: object) -> None:
        self._files = []

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        count = 0
        for path in self._files:
            with open_shard(path, framework="pt", device=str(self._device)) as shard:
                for name in list(shard.keys()):
                    tensor = shard.get_tensor(name)
                    if count == 3 and os.environ.get("STAND_IN_FAILS") == str(self._rank):
                        raise RuntimeError("CUDA out of memory, as it were\nand a second line")
                    root = count % self._world_size
                    if self._rank != root:
                        tensor = torch.empty_like(tensor)
                    dist.broadcast(tensor, group=self._group, group_src=root)
                    count += 1
                    yield name, tensor
