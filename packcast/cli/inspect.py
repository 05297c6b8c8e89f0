"""`packcast inspect`: what is in a checkpoint, from its headers alone. No torch, no tensor data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from packcast.checkpoint.checkpoint import Checkpoint, SourceFile, open_checkpoint
from packcast.cli.report import count
from packcast.cli.tables import Listing, exact, table
from packcast.units import format_size


def inspect(
    path: Path,
    *,
    all_files: bool,
    tensors: bool,
    exclude_files: Sequence[str] = (),
    follow_links: bool = False,
) -> Listing:
    """List the files, with `tensors` every tensor too; raises CheckpointError."""
    checkpoint = open_checkpoint(
        path, all_files=all_files, exclude_files=exclude_files, follow_links=follow_links
    )
    blocks = [_files_table(checkpoint), _totals(checkpoint)]
    if tensors:
        blocks.insert(0, _tensors_table(checkpoint))
    document = _document(checkpoint, tensors=tensors)
    return Listing("\n\n".join(blocks), document, checkpoint.warnings)


def _kind(file: SourceFile) -> str:
    return "shard" if file.header else "sidecar"


def _dtypes(file: SourceFile) -> dict[str, int]:
    """How many tensors of each dtype, most frequent first."""
    tensors = file.header.tensors if file.header else ()
    return dict(Counter(tensor.dtype for tensor in tensors).most_common())


def _files_table(checkpoint: Checkpoint) -> str:
    rows = [
        (
            file.name,
            _kind(file),
            exact(file.nbytes),
            f"{len(file.header.tensors):,}" if file.header else "",
            ", ".join(f"{number:,} {dtype}" for dtype, number in _dtypes(file).items()),
        )
        for file in checkpoint.files
    ]
    return table(("file", "kind", ">bytes", ">tensors", "dtypes"), rows)


def _totals(checkpoint: Checkpoint) -> str:
    return (
        f"{count(len(checkpoint.files), 'file')}, {count(checkpoint.num_tensors, 'tensor')}, "
        f"{exact(checkpoint.nbytes)} bytes ({format_size(checkpoint.nbytes)})"
    )


def _tensors_table(checkpoint: Checkpoint) -> str:
    rows = [
        (
            tensor.name,
            tensor.dtype,
            "x".join(map(str, tensor.shape)) or "scalar",
            exact(tensor.nbytes),
            file.name,
            exact(tensor.begin),
        )
        for file in checkpoint.files
        if file.header
        for tensor in file.header.tensors
    ]
    return table(("tensor", "dtype", "shape", ">bytes", "file", ">offset"), rows)


def _document(checkpoint: Checkpoint, *, tensors: bool) -> dict[str, object]:
    document: dict[str, object] = {
        "command": "inspect",
        "ok": True,
        "exit_code": 0,
        "error": None,
        "checkpoint": {
            "path": str(checkpoint.path),
            "files": len(checkpoint.files),
            "tensors": checkpoint.num_tensors,
            "bytes": checkpoint.nbytes,
        },
        "files": [
            {
                "name": file.name,
                "kind": _kind(file),
                "bytes": file.nbytes,
                "tensors": len(file.header.tensors) if file.header else 0,
                "dtypes": _dtypes(file),
                "metadata": file.header.metadata if file.header else {},
            }
            for file in checkpoint.files
        ],
        "warnings": list(checkpoint.warnings),
    }
    if tensors:
        document["tensors"] = [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "file": file.name,
                "offset": tensor.begin,
            }
            for file in checkpoint.files
            if file.header
            for tensor in file.header.tensors
        ]
    return document
