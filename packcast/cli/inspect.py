"""`packcast inspect`: the contents of a checkpoint, read from its headers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.leftout import LeftOut, left_out
from packcast.cli.contents import Contents, kind_of_file, left_out_lines
from packcast.cli.result import ending
from packcast.cli.tables import Listing, exact, table
from packcast.cli.terminal import printable


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
    contents = Contents(checkpoint.files)
    beside = left_out(path, {file.name for file in checkpoint.files}, exclude_files=exclude_files)
    blocks = [contents.files_table(), contents.totals(), printable(left_out_lines(beside))]
    if tensors:
        blocks.insert(0, _tensors_table(checkpoint))
    document = _document(checkpoint, contents, beside, tensors=tensors)
    return Listing("\n\n".join(filter(None, blocks)), document, checkpoint.warnings)


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


def _document(
    checkpoint: Checkpoint, contents: Contents, beside: Sequence[LeftOut], *, tensors: bool
) -> dict[str, object]:
    document: dict[str, object] = {
        **ending("inspect", None),
        "checkpoint": {"path": str(checkpoint.path), **contents.document()},
        "files": [
            {
                "name": file.name,
                "kind": kind_of_file(file),
                "bytes": file.nbytes,
                "tensors": len(file.header.tensors) if file.header else 0,
                "dtypes": dtypes,
                "metadata": file.header.metadata if file.header else {},
            }
            for file, dtypes in zip(checkpoint.files, contents.dtypes_of, strict=True)
        ],
        "left_out": [{"name": it.name, "reason": it.reason} for it in beside],
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
