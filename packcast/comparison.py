"""How a copy compares with what it should be, per file and tensor: plain data.

`=` same, `*` differs, `-` missing in the copy, `+` only in the copy, `!` could not be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mark = Literal["=", "*", "-", "+", "!"]


@dataclass(frozen=True, slots=True)
class ComparedFile:
    """One file; `tensors` are by name, those of a file that is the same only where known.

    `offset` is of the first byte that differs, where it was looked for; `reason` ends a sentence
    that begins with the name.
    """

    name: str
    mark: Mark
    tensors: tuple[tuple[str, Mark], ...] = ()
    offset: int | None = None
    reason: str | None = None

    def tensors_marked(self, *marks: Mark) -> list[str]:
        """The names of those tensors."""
        return [name for name, mark in self.tensors if mark in marks]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A copy beside a checkpoint, another copy or a manifest (`against`).

    `extra_counts` where files that only the copy has make it another one.
    """

    path: str
    against: str
    files: tuple[ComparedFile, ...]
    extra_counts: bool = True

    @property
    def equal(self) -> bool:
        """Whether every file is there and is the same, and there are no others that count."""
        return not self.marked("*", "-", "!", *(["+"] if self.extra_counts else []))

    def marked(self, *marks: str) -> list[ComparedFile]:
        """The files with one of the marks."""
        return [file for file in self.files if file.mark in marks]

    def lines(self) -> Iterator[str]:
        """For `--report`: mark, file and tensor, separated by tabs."""
        yield f"# {self.path} against {self.against}"
        for file in self.files:
            yield f"{file.mark}\t{file.name}"
            for tensor, mark in file.tensors:
                yield f"{mark}\t{file.name}\t{tensor}"
