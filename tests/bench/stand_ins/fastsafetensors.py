"""Stands in for the loader of this name: it wants what the real one wants, and fails as that does.

Files are dealt out to the ranks as there, but not read on a thread, nor broadcast in runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from safetensors.torch import load_file


class ParallelLoader:
    def __init__(
        self,
        pg: object,
        hf_weights_files: list[str],
        *,
        use_tqdm_on_load: bool = True,
        device: str = "cpu",
        nogds: bool = False,
    ) -> None:
        if not isinstance(pg, dist.ProcessGroup):
            raise Exception("pg must be an instance of torch.disributed.ProcessGroup")
        assert not use_tqdm_on_load
        assert nogds
        self._group, self._files, self._device = pg, hf_weights_files, torch.device(device)
        self._is_iterated = False

    def iterate_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._is_iterated = True
        try:
            for index, path in enumerate(self._files):
                root = index % self._group.size()
                for name, tensor in load_file(path, device=str(self._device)).items():
                    if self._group.rank() != root:
                        tensor = torch.empty_like(tensor)
                    dist.broadcast(tensor, group=self._group, group_src=root)
                    yield name, tensor
        finally:
            self._is_iterated = False

    def close(self) -> None:
        assert not self._is_iterated, "the iterator is closed first"
