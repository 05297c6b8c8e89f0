"""The sink that compares the received bytes with a local checkpoint.

Knows local files and the offered headers only.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from packcast.checkpoint.checkpoint import Checkpoint
from packcast.checkpoint.index import is_index
from packcast.checkpoint.outgoing import FileSpec
from packcast.checkpoint.sourcefile import SourceFile
from packcast.checkpoint.tensor_table import Tensor
from packcast.comparison import ComparedFile, Comparison, Mark
from packcast.errors import CheckpointError, PackcastError
from packcast.io.files import FileTable, close_quietly
from packcast.io.landing import Sink
from packcast.io.schedule import Schedule, Span
from packcast.io.sinks.localcopy import (
    SelectedTensors,
    check_unchanged,
    counterparts,
    selected_tensors,
)
from packcast.io.work import Failure, FailureKind, Task
from packcast.packed.counters import Stage
from packcast.packed.plan import Extent

_MAX_NAMED = 20
_MAX_NAMES_NBYTES = 8 << 10
_FILE_FLAGS = os.O_RDONLY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference between a local file and the offered one."""

    file: str
    offset: int  # of the first byte that differs, in the file
    tensor: str | None  # that the byte belongs to; None in a header or a sidecar
    reason: str  # the rest of a sentence that begins with the file's name


class VerifySink(Sink):
    """Compares verified runs with the `local` checkpoint and records where they differ.

    Calls as a sink's: prepare, spans and open_files, compared, finish, publish; abort at any time.
    A difference is no error. Raises CheckpointError if the local checkpoint cannot be read or
    changes. Read `difference` after finish. With a `selection` each tensor is compared with the
    local tensor of its name, wherever it is in the file; indexes are not compared.
    """

    stage: ClassVar[Stage] = "verify"
    task = Task.COMPARE

    def __init__(
        self, local: Checkpoint, files: Sequence[FileSpec], *, selection: bool = False
    ) -> None:
        super().__init__()
        self._is_selection = selection
        self._chosen: dict[int, SelectedTensors] = {}
        self._checkpoint = local
        self._files = tuple(files)
        self._locals = counterparts(local, self._files)
        self._extra: list[str] = []
        self._found: dict[int, Difference] = {}  # the first of each file that differs
        self._differing_tensors: set[tuple[int, int]] = set()
        self._table = FileTable(len(self._files), self._open, close_quietly)

    @property
    def difference(self) -> Difference | None:
        """The first difference known, in the order of the files and of their bytes."""
        return self._found[min(self._found)] if self._found else None

    @property
    def differing_tensors(self) -> int:
        return len(self._differing_tensors)

    @property
    def differing_files(self) -> int:
        return len(self._found)

    def prepare(self) -> None:
        """Record the differences in size: files that are missing here, longer or shorter."""
        for index, (spec, local) in enumerate(zip(self._files, self._locals, strict=True)):
            if self._is_selection and local is not None and self._choose(index, spec, local):
                continue
            if local is None or local.nbytes != spec.nbytes:
                self._record_size(index, spec, local)
        matched = {local.name for local in self._locals if local is not None}
        self._extra = [it.name for it in self._checkpoint.files if it.name not in matched]
        if self._extra:
            also = _listed(self._extra)
            self.notes.append(f"{self._checkpoint.path} also has {also}, not compared")

    def spans(self, extent: Extent) -> Iterator[Span]:
        """The local bytes to compare with, cut where tensors begin and end."""
        local = self._locals[extent.file]
        if index_left_out(self._is_selection, self._files[extent.file].name):
            return
        chosen = self._chosen.get(extent.file)
        end = extent.offset + extent.nbytes
        if chosen is None:
            end = min(end, local.nbytes if local else 0)
        if extent.offset >= end:
            return
        cuts = [extent.offset, *self._cuts(extent.file, extent.offset, end), end]
        for begin, stop in pairwise(cuts):
            local_offset = chosen.local_offset(begin) if chosen else begin
            if local_offset is not None:
                yield Span(extent.file, local_offset, begin - extent.offset, stop - begin)

    def _choose(self, index: int, spec: FileSpec, local: SourceFile) -> bool:
        """Whether the file is compared by tensor or not at all: its size does not matter."""
        if index_left_out(self._is_selection, spec.name):
            self.notes.append(f"{spec.name}: not compared, since that of a selection is shorter")
            return True
        chosen = selected_tensors(spec.header, local.path, spec.name) if spec.header else None
        if chosen is None:
            return False
        self._chosen[index] = chosen
        for position in chosen.absent:
            tensor = spec.header.tensors[position] if spec.header else None
            assert tensor is not None
            reason = f"has no tensor {tensor.name} of that dtype and shape"
            self._record(index, tensor.begin, {(index, position)}, reason)
        return True

    def open_files(self, schedule: Schedule) -> FileTable:
        """The local files, for I/O threads."""
        return self._table

    def error_of(self, failure: Failure, span: Span) -> PackcastError:
        """What kept a local file from being read."""
        if failure.kind is FailureKind.END_OF_FILE:
            return CheckpointError(
                f"{self._files[span.file].name} became shorter while it was being compared",
                hint="run it again",
            )
        return CheckpointError(f"cannot read {self._path_of(span.file)}: {failure.reason}")

    def compared(self, span: Span, offset: int) -> None:
        """A span differs, first at byte `offset` of the file."""
        if span.file in self._chosen:
            offset = self._chosen[span.file].offered_offset(offset)
        header = self._files[span.file].header
        tensors = header.tensors if header else ()
        index = bisect_right(tensors, offset, key=_end_of)
        is_inside = index < len(tensors) and tensors[index].begin <= offset
        self._record(span.file, offset, {(span.file, index)} if is_inside else set(), None)

    def finish(self) -> None:
        """After the last extent: check that the local files have not changed."""
        self._table.close()
        for local in self._locals:
            if local is not None:
                try:
                    check_unchanged(local, os.stat(local.path))
                except OSError as error:
                    raise CheckpointError(f"cannot read {local.path}: {error.strerror}") from error

    def abort(self) -> None:
        """Stop comparing; any thread, any number of times."""
        self._table.close()

    def sentence(self) -> str | None:
        """What differs, for people: the first difference and how many tensors or files do."""
        if not self._found:
            return None
        missing = self._missing()
        others = [self._found[index] for index in sorted(self._found) if index not in missing]
        parts = [f"{others[0].file} {others[0].reason}"] if others else []
        if missing:
            names = [self._files[index].name for index in missing]
            parts.insert(0, f"{_listed(names)} {'is' if len(names) == 1 else 'are'} missing here")
        num_tensors = sum(len(spec.header.tensors) for spec in self._files if spec.header)
        if self._differing_tensors:
            parts.append(_count(self.differing_tensors, num_tensors, "tensor"))
        else:
            parts.append(_count(self.differing_files, len(self._files), "file"))
        return "; ".join(parts)

    def result(self) -> dict[str, object]:
        found, missing = self.difference, self._missing()
        return {
            "sink": "verify",
            "checkpoint": str(self._checkpoint.path),
            "equal": found is None,
            "difference": None
            if found is None
            else {"file": found.file, "offset": found.offset, "tensor": found.tensor},
            "sentence": self.sentence(),
            "differing_tensors": self.differing_tensors,
            "differing_files": self.differing_files,
            "missing": _bounded([self._files[index].name for index in missing]),
            "differing": _bounded(
                [self._files[index].name for index in sorted(self._found) if index not in missing]
            ),
            "extra": _bounded(self._extra),
            "notes": list(self.notes),
        }

    def comparison(self) -> Comparison:
        """Every file and tensor with its mark; after finish."""
        files = [self._compared(index, spec) for index, spec in enumerate(self._files)]
        files += [ComparedFile(name, "+", reason="is extra") for name in self._extra]
        path = str(self._checkpoint.path)
        return Comparison(path, "the sender's checkpoint", tuple(files), extra_counts=False)

    def _compared(self, index: int, spec: FileSpec) -> ComparedFile:
        is_missing = self._locals[index] is None
        wrong: Mark = "-" if is_missing else "*"
        tensors = tuple(
            (tensor.name, wrong if (index, position) in self._differing_tensors else "=")
            for position, tensor in enumerate(spec.header.tensors if spec.header else ())
        )
        found = self._found.get(index)
        if found is None:
            return ComparedFile(spec.name, "=", tensors)
        return ComparedFile(spec.name, wrong, tensors, found.offset, found.reason)

    def _missing(self) -> list[int]:
        return [index for index, local in enumerate(self._locals) if local is None]

    def _path_of(self, file: int) -> Path | None:
        local = self._locals[file]
        return local.path if local else None

    def _open(self, index: int) -> int:
        local = self._locals[index]
        assert local is not None
        try:
            fd = os.open(local.path, _FILE_FLAGS)
        except OSError as error:
            raise CheckpointError(f"cannot read {local.path}: {error.strerror}") from error
        try:
            check_unchanged(local, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _cuts(self, file: int, begin: int, end: int) -> list[int]:
        """Where tensors begin or end strictly between two bytes of the file."""
        header = self._files[file].header
        tensors = header.tensors if header else ()
        cuts = []
        # Tensors do not overlap, so those that reach into this run are neighbours.
        index = bisect_right(tensors, begin, key=_end_of)
        while index < len(tensors) and tensors[index].begin < end:
            cuts += [tensors[index].begin, tensors[index].end]
            index += 1
        return sorted({cut for cut in cuts if begin < cut < end})

    def _record_size(self, index: int, spec: FileSpec, local: SourceFile | None) -> None:
        tensors = spec.header.tensors if spec.header else ()
        num_here = -1 if local is None else local.nbytes
        lost = {
            (index, position) for position, tensor in enumerate(tensors) if tensor.end > num_here
        }
        reason = "is missing here"
        if local is not None:
            reason = f"has {local.nbytes:,} bytes here and {spec.nbytes:,} in the offer"
        self._record(index, min(max(num_here, 0), spec.nbytes), lost, reason)

    def _record(
        self, file: int, offset: int, tensors: set[tuple[int, int]], reason: str | None
    ) -> None:
        self._differing_tensors |= tensors
        if file not in self._found or offset < self._found[file].offset:
            self._found[file] = self._describe(file, offset, reason)

    def _describe(self, file: int, offset: int, reason: str | None) -> Difference:
        spec, local = self._files[file], self._locals[file]
        tensor = spec.header.tensor_at(offset) if spec.header and offset < spec.nbytes else None
        if reason is None:
            reason = f"differs at byte {offset:,}"
            if tensor:
                reason += f" (tensor {tensor.name}, its byte {offset - tensor.begin:,})"
            elif spec.header:
                reason += " (in its header)"
            is_whole = file not in self._chosen
            if local is not None and local.nbytes != spec.nbytes and is_whole:
                reason += f", and has {local.nbytes:,} bytes here, {spec.nbytes:,} in the offer"
        return Difference(spec.name, offset, tensor.name if tensor else None, reason)


def index_left_out(is_selection: bool, name: str) -> bool:
    """Whether the file is an index of a selection, which no index of the whole can equal."""
    return is_selection and is_index(name)


def _end_of(tensor: Tensor) -> int:
    return tensor.end


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _bounded(names: Sequence[str]) -> list[str]:
    """As many as a message to the sender holds."""
    kept: list[str] = []
    left = _MAX_NAMES_NBYTES
    for name in names:
        left -= len(name.encode()) + 4
        if left < 0:
            break
        kept.append(name)
    return kept


def _count(number: int, total: int, noun: str) -> str:
    plural = "" if total == 1 else "s"
    return f"{number:,} of {total:,} {noun}{plural} {'differs' if number == 1 else 'differ'}"
