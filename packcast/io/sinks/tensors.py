"""The sink that makes tensors of what comes: runs of files become parts of tensors on a shelf.

Knows headers and memory; not who takes the tensors, nor where the bytes come from.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from packcast.checkpoint.header import Header, Tensor
from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import PackcastError, TransferError
from packcast.io.schedule import IN_MEMORY, SPAN_FIELDS, Schedule, ScheduledUnit, Span
from packcast.io.sinks.shelf import Shelf, bytes_of
from packcast.io.work import Failure, Task
from packcast.packed.plan import Extent


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

    Calls as a sink's: prepare, spans and open_files, finish, publish; abort at any time. On the
    host I/O threads copy into the tensors. Where bytes stay on the device, `parts_of` and `landed`
    stand for that (see DeviceLanding). Holds no memory but that of tensors that are not complete.
    """

    stage: Final = "unpack"
    task: Final = Task.WRITE  # into memory

    def __init__(self, files: Sequence[FileSpec], shelf: Shelf) -> None:
        self._files = files
        self._shelf = shelf
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._growing: dict[tuple[int, int], Growing | None] = {}
        self._num_complete = 0
        self._aborted = False
        self._keys: list[tuple[int, int]] = []  # by span: file and tensor
        self._spans = array("q")
        self.descriptors = array("i", [-1])

    @property
    def peak_nbytes(self) -> int:
        """Memory made for tensors that were not whole, the most at a time."""
        return self._shelf.peak_nbytes

    def prepare(self) -> None:
        """Raise UsageError where a tensor cannot be received, before anything is."""
        self._shelf.check(self._files)

    def spans(self, extent: Extent) -> Iterator[Span]:
        """On the host: the tensors' memory, which `admit` makes; until then offsets in tensors."""
        header = self._files[extent.file].header
        for index, low, high in _overlaps(header, extent.offset, extent.offset + extent.nbytes):
            self._keys.append((extent.file, index))
            assert header is not None, "only a header has tensors"
            yield Span(
                IN_MEMORY, low - header.tensors[index].begin, low - extent.offset, high - low
            )

    def open_files(self, schedule: Schedule) -> TensorSink:
        """It opens none, but has the memory that spans lead to."""
        self._spans = schedule.spans
        return self

    def admit(self, unit: ScheduledUnit, *, is_next: bool) -> bool:
        """Have the memory of every tensor that the unit has bytes of."""
        for span in unit.spans:
            file, index = key = self._keys[span]
            header = self._files[file].header
            assert header is not None, "only a header has tensors"
            with self._lock:
                self._raise_if_aborted()
                growing = self._grow(key, header.tensors[index])
            if growing is None:
                self._spans[SPAN_FIELDS * span + 3] = 0
            else:
                self._spans[SPAN_FIELDS * span + 1] += growing.data.data_ptr()
        return True

    def retire(self, unit: ScheduledUnit) -> None:
        """The unit's bytes are in its tensors; whole tensors go to the shelf."""
        for span in unit.spans:
            growing = self._growing.get(self._keys[span])
            if growing is not None:
                nbytes = self._spans[SPAN_FIELDS * span + 3]
                self.landed([Part(growing, 0, 0, nbytes)])

    def hold(self) -> None:
        """Its memory is kept by whoever waits for it."""

    def let_go(self) -> None:
        """Tensors that will not be complete may go."""
        with self._lock:
            if self._aborted:
                self._growing.clear()

    def error_of(self, failure: Failure, span: Span) -> PackcastError:
        return TransferError(f"copying into tensors failed: {failure.reason}")

    def compared(self, span: Span, offset: int) -> None:
        """Nothing is."""

    def parts_of(self, file: int, offset: int, nbytes: int) -> list[Part]:
        """Which tensors' bytes a run holds; each byte once, in order. Makes their memory.

        An empty tensor's part is in the run that has the byte before it, so every tensor has one.
        """
        with self._lock:
            self._raise_if_aborted()
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
        self._shelf.stop()

    def result(self) -> dict[str, object]:
        return {"sink": "tensors", "tensors": self._num_complete}

    def _raise_if_aborted(self) -> None:
        if self._aborted:
            raise TransferError("the transfer is over")

    def _parts_of(self, file: int, begin: int, end: int) -> Iterator[Part]:
        header = self._files[file].header
        for index, low, high in _overlaps(header, begin, end):
            assert header is not None, "only a header has tensors"
            tensor = header.tensors[index]
            growing = self._grow((file, index), tensor)
            if growing is not None:
                yield Part(growing, low - begin, low - tensor.begin, high - low)

    def _grow(self, key: tuple[int, int], tensor: Tensor) -> Growing | None:
        if key not in self._growing:
            memory = self._shelf.memory_for(tensor)
            self._growing[key] = (
                None
                if memory is None
                else Growing(key, tensor, memory, bytes_of(memory), tensor.nbytes)
            )
        return self._growing[key]


def _overlaps(header: Header | None, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The tensors of which a run of a file has bytes: index, begin and end of those in the file.

    An empty tensor is in the run that has the byte before it, so every tensor is in one.
    """
    tensors = header.tensors if header else ()
    index = bisect_right(tensors, begin, key=lambda tensor: tensor.end)
    while index < len(tensors) and (tensors[index].begin < end or tensors[index].end <= end):
        yield index, max(tensors[index].begin, begin), min(tensors[index].end, end)
        index += 1
