"""The sink that makes tensors of what comes: runs of files become parts of tensors on a shelf.

Knows headers and memory; not who takes the tensors, nor where the bytes come from.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from packcast.checkpoint.header import Tensor
from packcast.checkpoint.outgoing import FileSpec
from packcast.ends.placed import PlacedTensors
from packcast.ends.shelf import Shelf, bytes_of
from packcast.ends.work import Outcome, Span, Task
from packcast.errors import TransferError
from packcast.packed.plan import Chunk, Extent
from packcast.packed.ring import host_view


@dataclass(slots=True)
class Growing:
    """A tensor on its way: `data` is its memory as bytes, `left` how many of them are to come."""

    key: tuple[int, int]
    tensor: Tensor
    memory: torch.Tensor
    data: torch.Tensor
    left: int


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of one tensor in a run: from `begin` in the run, to `offset` in the tensor."""

    growing: Growing
    begin: int
    offset: int
    nbytes: int


class TensorSink:
    """Puts proven runs of the offered shards into tensors on `shelf`; sidecars are dropped.

    Calls as a sink's: prepare, lend and take (many threads), finish, publish; abort at any time.
    Where bytes stay on the device, `placed` stands for lend and take (see DeviceLanding).
    Holds no memory but that of tensors that are not complete.
    """

    stage: Final = "unpack"
    task: Final = Task.CHECK

    def __init__(self, files: Sequence[FileSpec], shelf: Shelf) -> None:
        self._files = files
        self._shelf = shelf
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._growing: dict[tuple[int, int], Growing | None] = {}
        self._num_complete = 0
        self._placed: PlacedTensors | None = None
        self._aborted = False

    def prepare(self) -> None:
        """Raise UsageError where a tensor cannot be received, before anything is."""
        self._shelf.check(self._files)

    def lend(self, extent: Extent) -> tuple[Span, ...]:
        """Its bytes go to no file."""
        return ()

    def take(
        self, extent: Extent, spans: tuple[Span, ...], data: memoryview, outcome: Outcome
    ) -> None:
        """Copy a proven run into its tensors on the host; any thread, disjoint runs."""
        if not outcome.good:
            return
        with self._lock:
            if self._aborted:
                raise TransferError("the transfer is over")
            parts = list(self._parts_of(extent.file, extent.offset, extent.offset + extent.nbytes))
        for part in parts:
            if part.nbytes:
                into = host_view(part.growing.data)[part.offset : part.offset + part.nbytes]
                into[:] = data[part.begin : part.begin + part.nbytes]
            self._landed(part)

    def placed(self, chunks: Sequence[Chunk]) -> PlacedTensors:
        """Before READY, after `prepare`: for an end whose chunks land whole and in order, instead
        of `take`. On the stream that is to write into the tensors."""
        placed = PlacedTensors(self._files, self._shelf, chunks)
        with self._lock:
            self._placed = placed
            if self._aborted:
                placed.stop()
        return placed

    def finish(self) -> None:
        """After the last run: block until the taker has taken all."""
        self._shelf.finish()

    def publish(self) -> None:
        """Nothing to name."""

    def abort(self) -> None:
        """Wake whoever waits for the taker; tensors that are handed out stay."""
        with self._lock:
            self._aborted = True
            self._growing.clear()
        if self._placed is not None:
            self._placed.stop()
        self._shelf.stop()

    def result(self) -> dict[str, object]:
        num_complete = self._num_complete if self._placed is None else self._placed.num_complete
        return {"sink": "tensors", "tensors": num_complete}

    def _landed(self, part: Part) -> None:
        """It is in the tensor's memory; a whole tensor goes to the shelf."""
        growing = part.growing
        with self._lock:
            growing.left -= part.nbytes
            is_whole = growing.left == 0
            if is_whole:
                self._growing.pop(growing.key, None)
                self._num_complete += 1
        if is_whole:
            # Not under the lock: the taker may keep us waiting.
            self._shelf.complete(growing.tensor, growing.memory)

    def _parts_of(self, file: int, begin: int, end: int) -> Iterator[Part]:
        """Which tensors' bytes a run holds; each byte once, in order. Makes their memory.

        An empty tensor's part is in the run that has the byte before it, so every tensor has one.
        """
        header = self._files[file].header
        tensors = header.tensors if header else ()
        index = bisect_right(tensors, begin, key=lambda tensor: tensor.end)
        while index < len(tensors) and (tensors[index].begin < end or tensors[index].end <= end):
            tensor = tensors[index]
            growing = self._grow((file, index), tensor)
            if growing is not None:
                low, high = max(tensor.begin, begin), min(tensor.end, end)
                yield Part(growing, low - begin, low - tensor.begin, high - low)
            index += 1

    def _grow(self, key: tuple[int, int], tensor: Tensor) -> Growing | None:
        if key not in self._growing:
            self._growing[key] = self._grown(key, tensor) if self._shelf.wants(tensor) else None
        return self._growing[key]

    def _grown(self, key: tuple[int, int], tensor: Tensor) -> Growing:
        memory = self._shelf.own_memory_of(tensor)
        if memory is None:
            (memory,) = self._shelf.make([tensor])
        return Growing(key, tensor, memory, bytes_of(memory), tensor.nbytes)
