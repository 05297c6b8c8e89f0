"""`packcast send --dry-run`: what would go, in which chunks, and the memory it needs. No torch."""

from __future__ import annotations

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import FileSpec, outgoing_files
from packcast.cli.report import count
from packcast.cli.tables import Listing, exact, table
from packcast.packed.plan import Chunk, pinned_nbytes, plan_chunks, ring_nbytes, trailer_nbytes
from packcast.settings import Settings, fitting_buffer_size
from packcast.units import format_exact_size, format_size


def dry_run(settings: Settings) -> Listing:
    """Files, chunks and memory; raises what `send` would raise before it moves a byte."""
    assert settings.checkpoint is not None
    checkpoint = open_checkpoint(
        settings.checkpoint,
        sidecars=settings.sidecars,
        all_files=settings.all_files,
        exclude_files=settings.exclude_files,
        follow_links=settings.follow_links,
    )
    outgoing = outgoing_files(checkpoint, include=settings.include, exclude=settings.exclude)
    files = tuple(file.spec for file in outgoing)
    size = settings.buffer_size or fitting_buffer_size(sum(file.nbytes for file in files))
    chunks = plan_chunks([file.nbytes for file in files], size, (0,))
    return Listing(
        _text(settings, size, checkpoint, files, chunks),
        _document(settings, size, checkpoint, files, chunks),
        checkpoint.warnings,
    )


def _num_tensors(files: tuple[FileSpec, ...]) -> int:
    return sum(len(file.header.tensors) for file in files if file.header)


def _text(
    settings: Settings,
    size: int,
    checkpoint: Checkpoint,
    files: tuple[FileSpec, ...],
    chunks: tuple[Chunk, ...],
) -> str:
    nbytes = sum(file.nbytes for file in files)
    number = settings.num_buffers
    device = ring_nbytes(size, number)
    rows = [
        (file.name, "shard" if file.header else "sidecar", exact(file.nbytes)) for file in files
    ]
    facts = [
        ("checkpoint", str(checkpoint.path)),
        ("files", f"{len(files):,}"),
        ("tensors", f"{_num_tensors(files):,}"),
        ("bytes", f"{exact(nbytes)} ({format_size(nbytes)})"),
        ("chunks", f"{len(chunks):,} of at most {format_exact_size(size)}"),
        (
            "device memory",
            f"{exact(device)} bytes on each rank: {count(number, 'buffer')} of "
            f"{format_exact_size(size)} + {trailer_nbytes(size)}",
        ),
        (
            "pinned memory",
            f"{exact(pinned_nbytes(size, settings.staging))} bytes"
            " on each rank with a GPU that reads or writes files",
        ),
    ]
    return "\n".join(
        [
            table(("file", "kind", ">bytes"), rows),
            "",
            table(("", ""), facts),
            "",
            "dry run: nothing was sent",
        ]
    )


def _document(
    settings: Settings,
    size: int,
    checkpoint: Checkpoint,
    files: tuple[FileSpec, ...],
    chunks: tuple[Chunk, ...],
) -> dict[str, object]:
    number = settings.num_buffers
    return {
        "command": "send",
        "dry_run": True,
        "ok": True,
        "exit_code": 0,
        "error": None,
        "checkpoint": {
            "path": str(checkpoint.path),
            "files": len(files),
            "tensors": _num_tensors(files),
            "bytes": sum(file.nbytes for file in files),
        },
        "files": [
            {
                "name": file.name,
                "kind": "shard" if file.header else "sidecar",
                "bytes": file.nbytes,
                "tensors": len(file.header.tensors) if file.header else 0,
            }
            for file in files
        ],
        "chunks": len(chunks),
        "buffers": {"size": size, "count": number, "staging": settings.staging},
        "device_bytes": ring_nbytes(size, number),
        "pinned_bytes": pinned_nbytes(size, settings.staging),
        "warnings": list(checkpoint.warnings),
    }
