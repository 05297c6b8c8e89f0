"""Tensors of a plan whose chunks land whole and in order: where each is, and when it is complete.

Tensors that have their memory cost nothing here while bytes move; those that get it on the way cost
their making and their handing out. Knows no devices, and not how the bytes come.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import torch

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import TransferError
from packcast.io.sinks.tensor_destination import TensorDestination
from packcast.packed.plan import Chunk
from packcast.packed.tensor_map import Groups, Rows, map_tensors


class PlannedTensors:
    """The offered tensors that `destination` takes, by their place in the plan, and their memory.

    Without those `left_out`, by file and position in its header.

    For every chunk, in order: `begin` it, put its bytes where `rows` and `addresses` say, and once
    they are proven say that it has `landed`. `begin` and `landed` are for a thread each, `stop` for
    any, at any time. Made on the stream that is to write there, as `begin` is called on it.
    """

    def __init__(
        self,
        files: Sequence[FileSpec],
        destination: TensorDestination,
        chunks: Sequence[Chunk],
        left_out: Collection[tuple[int, int]] = (),
    ) -> None:
        self._destination = destination
        offered = [
            (file, position, tensor)
            for file, spec in enumerate(files)
            for position, tensor in enumerate(spec.header.tensors if spec.header else ())
            if (file, position) not in left_out and destination.wants(tensor)
        ]
        # By file and place in its header.
        self.index_of = {(file, at): i for i, (file, at, _) in enumerate(offered)}
        self._tensors = [tensor for _, _, tensor in offered]
        runs = [(file, tensor.begin, tensor.end) for file, _, tensor in offered]
        where = map_tensors(runs, [spec.nbytes for spec in files], chunks)
        self.rows: Rows = where.rows
        self.memory = [destination.own_memory_of(tensor) for tensor in self._tensors]
        self.addresses = torch.tensor(
            [0 if memory is None else memory.data_ptr() for memory in self.memory],
            dtype=torch.int64,
        )
        is_late = torch.tensor([memory is None for memory in self.memory], dtype=torch.bool)
        self._begun = Groups.by(where.first, len(chunks), is_late)
        self._done = Groups.by(where.last, len(chunks), is_late)
        self._num_complete: list[int] = where.num_complete().tolist()
        late_rows = is_late.index_select(0, self.rows.tensor).to(torch.int64)
        num_late = torch.zeros(len(chunks), dtype=torch.int64)
        num_late.index_add_(0, self.rows.chunks(), late_rows)
        # For each chunk: do all of its tensors have their memory from the beginning?
        self.is_settled: list[bool] = (num_late == 0).tolist()
        self.num_complete = 0
        self._lock = threading.Lock()
        self._stopped = False

    def begin(self, chunk: int) -> None:
        """Make the memory of those that begin in this chunk; raises TransferError after `stop`."""
        begun = self._begun.of(chunk)
        indexes = begun.tolist()
        # Not under the lock: making memory may take its time, and `stop` is not to wait for that.
        made = (
            self._destination.make([self._tensors[index] for index in indexes]) if indexes else []
        )
        with self._lock:
            if self._stopped:
                raise TransferError("the transfer is over")
            for index, memory in zip(indexes, made, strict=True):
                self.memory[index] = memory
        if made:
            pointers = torch.tensor([memory.data_ptr() for memory in made], dtype=torch.int64)
            self.addresses.index_copy_(0, begun, pointers)

    def landed(self, chunk: int) -> None:
        """This chunk, and all before it, are proven and in memory: those that end go to the destination.

        Who takes them may keep us waiting.
        """
        for index in self._done.of(chunk).tolist():
            with self._lock:
                memory, self.memory[index] = self.memory[index], None
            assert memory is not None, "it has begun, and ends once"
            self._destination.complete(self._tensors[index], memory)
        self.num_complete = self._num_complete[chunk]

    def unfinished(self) -> list[torch.Tensor]:
        """The memory that is ours still, or the caller's own: where copies may be under way."""
        with self._lock:
            return [memory for memory in self.memory if memory is not None]

    def stop(self) -> None:
        """No more memory is made. What there is stays until nobody can be writing there."""
        with self._lock:
            self._stopped = True
