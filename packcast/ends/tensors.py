"""The sink that makes tensors of what comes: runs of files become parts of tensors on a shelf.

Knows headers and memory; not who takes the tensors, nor where the bytes come from.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from packcast.checkpoint.header import Tensor
from packcast.checkpoint.outgoing import FileSpec
from packcast.checkpoint.reading import shown
from packcast.ends.shelf import Shelf, bytes_of
from packcast.ends.work import Outcome, Span, Task
from packcast.errors import TransferError
from packcast.packed.plan import Extent
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
    Where bytes stay on the device, `parts_of` and `landed` stand for those (see DeviceLanding).
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
        self._left_out: set[tuple[int, int]] = set()
        self._num_complete = 0
        self._aborted = False

    def prepare(self) -> None:
        """Raise UsageError where a tensor cannot be received, before anything is."""
        old = [(file, i) for file, spec in enumerate(self._files) for i in spec.elsewhere]
        self._left_out = {*old, *self._shelf.check(self._files)}
        self.notes += _notes(self._files, old, self._left_out)

    def lend(self, extent: Extent) -> tuple[Span, ...]:
        """Its bytes go to no file."""
        return ()

    def take(
        self, extent: Extent, spans: tuple[Span, ...], data: memoryview, outcome: Outcome
    ) -> None:
        """Copy a proven run into its tensors on the host; any thread, disjoint runs."""
        if not outcome.good:
            return
        for part in self.parts_of(extent.file, extent.offset, extent.nbytes):
            if part.nbytes:
                into = host_view(part.growing.data)[part.offset : part.offset + part.nbytes]
                into[:] = data[part.begin : part.begin + part.nbytes]
            self.landed([part])

    def parts_of(self, file: int, offset: int, nbytes: int) -> list[Part]:
        """Which tensors' bytes a run holds; each byte once, in order. Makes their memory.

        An empty tensor's part is in the run that has the byte before it, so every tensor has one.
        """
        with self._lock:
            if self._aborted:
                raise TransferError("the transfer is over")
            return list(self._parts_of(file, offset, offset + nbytes))

    def landed(self, parts: Sequence[Part]) -> None:
        """These are proven, and in the tensors' memory; whole tensors go to the shelf."""
        for part in parts:
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
        self._shelf.stop()

    def result(self) -> dict[str, object]:
        return {"sink": "tensors", "tensors": self._num_complete}

    def _parts_of(self, file: int, begin: int, end: int) -> Iterator[Part]:
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
        if key in self._left_out:
            return None
        if key not in self._growing:
            memory = self._shelf.memory_for(tensor)
            self._growing[key] = (
                None
                if memory is None
                else Growing(key, tensor, memory, bytes_of(memory), tensor.nbytes)
            )
        return self._growing[key]


def _notes(
    files: Sequence[FileSpec], old: Sequence[tuple[int, int]], left_out: set[tuple[int, int]]
) -> list[str]:
    """What is to be said of tensors that are in several shards."""
    notes = []
    if old:
        copies = "1 tensor" if len(old) == 1 else f"{len(old)} tensors"
        file = files[old[0][0]].name
        notes.append(f"{copies} left out, as in {file}: the index names another shard for them")
    names = Counter(
        tensor.name
        for file, spec in enumerate(files)
        for i, tensor in spec.tensors
        if (file, i) not in left_out
    )
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        number = "1 tensor is" if len(twice) == 1 else f"{len(twice)} tensors are"
        notes.append(
            f"{number} in several shards, as {shown(twice[0])}, and no index says which one counts:"
            " each is handed out, in no certain order"
        )
    return notes
