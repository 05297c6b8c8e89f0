"""`packcast send --dry-run`: the files, chunks, memory and disk space of a transfer. No torch.

Raises the errors that `send` would raise before it moves a byte, as far as this host can know.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.leftout import LeftOut, left_out
from packcast.checkpoint.outgoing import FileSpec, outgoing_files
from packcast.cli.contents import Contents, kind_of_file, left_out_lines
from packcast.cli.result import count, ending
from packcast.cli.tables import Listing, table
from packcast.cli.terminal import printable
from packcast.control.rank_info import RankInfo
from packcast.control.rank_info import printable as one_line
from packcast.errors import DestinationError
from packcast.io.memory import MemoryLimit, memory_limits
from packcast.io.sinks.target import check_replaceable, locate
from packcast.launch.devices import boot_id, has_gpu_driver, host_name
from packcast.launch.fitting import CUDA_AND_NCCL_NBYTES, Fitted, fit_buffers
from packcast.packed.plan import Chunks, plan_chunks
from packcast.settings import Settings, fill_in
from packcast.units import format_exact_size, format_size

_MAX_MODES = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak bytes that packcast takes on a rank; `device` is where its ring is. `limits` are those
    on this host's memory."""

    device: str
    ring: int
    pinned: int
    limits: tuple[MemoryLimit, ...]


@dataclass(frozen=True, slots=True)
class Space:
    """Room on one file system of this host: for the copies that would go there."""

    path: str
    copies: int
    needed: int
    free: int | None


@dataclass(frozen=True, slots=True)
class DryRun:
    """All that is found."""

    settings: Settings
    checkpoint: Checkpoint
    files: tuple[FileSpec, ...]
    contents: Contents
    chunks: Chunks
    fitted: Fitted
    memory: Memory
    spaces: tuple[Space, ...]
    beside: tuple[LeftOut, ...]


def dry_run(settings: Settings, nproc: int | None) -> Listing:
    """Files, chunks, memory, and room for the copies of `nproc` ranks on this host."""
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
    fitted, memory = _fitted(settings, sum(file.nbytes for file in files), nproc or 1)
    size = fitted.sizes.buffer_size
    beside = left_out(
        settings.checkpoint,
        {file.name for file in files},
        sidecars=settings.sidecars,
        exclude_files=settings.exclude_files,
    )
    found = DryRun(
        settings,
        checkpoint,
        files,
        Contents(files),
        plan_chunks([file.nbytes for file in files], size, (0,)),
        fitted,
        memory,
        tuple(_spaces(settings, files, nproc)),
        tuple(beside),
    )
    warnings = (*checkpoint.warnings, *fitted.notes)
    return Listing(_text(found), {**_document(found), "warnings": list(warnings)}, warnings)


def _fitted(settings: Settings, nbytes: int, num_ranks: int) -> tuple[Fitted, Memory]:
    """The buffers for `num_ranks` ranks on this host, and what each takes. On a CPU the ring is the
    staging too."""
    on_cpu = settings.device == "cpu" or settings.backend == "gloo" or not has_gpu_driver()
    device = "cpu" if on_cpu else "cuda"
    limits = memory_limits()
    infos = [
        RankInfo(
            role="send",
            rank=rank,
            host=one_line(host_name()),
            boot_id=boot_id(),
            pid=os.getpid(),
            memory=limits,
        )
        for rank in range(num_ranks)
    ]
    fitted = fit_buffers(settings, nbytes, infos, dict.fromkeys(range(num_ranks), device))
    sizes = fitted.sizes
    pinned = 0 if on_cpu else sizes.pinned_nbytes
    return fitted, Memory(device, sizes.ring_nbytes, pinned, limits)


def _spaces(settings: Settings, files: Sequence[FileSpec], nproc: int | None) -> list[Space]:
    """Of each file system that copies would be written to; raises DestinationError as `send`."""
    if settings.sink != "write" or settings.target is None:
        return []
    host, names = host_name(), [file.name for file in files]
    targets = {
        fill_in(settings.target, rank=rank, local_rank=rank, host=host)
        for rank in range(1, nproc or 2)
    }
    by_device: dict[int, tuple[str, int]] = {}
    for target in sorted(targets):
        located = locate(Path(target), "0" * 32, in_place=settings.in_place)
        check_replaceable(located, names, force=settings.force)
        above = located.path
        while not os.path.isdir(above):
            above = os.path.dirname(above)
        device = os.stat(above).st_dev
        path, copies = by_device.get(device, (above, 0))
        by_device[device] = path, copies + 1
    nbytes = sum(file.nbytes for file in files)
    spaces = [_space(path, copies, copies * nbytes) for path, copies in by_device.values()]
    for space in spaces:
        if space.free is not None and space.free < space.needed:
            raise DestinationError(
                f"{space.path}: {count(space.copies, 'copy', 'copies')} need"
                f"{'s' * (space.copies == 1)} {format_size(space.needed)},"
                f" and {format_size(space.free)} are free",
                hint="free some space, or choose another --out",
            )
    return spaces


def _space(path: str, copies: int, needed: int) -> Space:
    room = os.statvfs(path)
    free = room.f_bavail * room.f_frsize if room.f_blocks else None
    return Space(path, copies, needed, free)


def _text(found: DryRun) -> str:
    settings, memory, sizes = found.settings, found.memory, found.fitted.sizes
    where = "host memory" if memory.device == "cpu" else "GPU memory"
    facts = [
        ("checkpoint", str(found.checkpoint.path)),
        ("goes to", _goes_to(settings)),
        ("modes", _modes(found.files)),
        ("chunks", f"{len(found.chunks):,} of at most {format_exact_size(sizes.buffer_size)}"),
        (where, f"{format_size(memory.ring)} on each rank, sender and workers alike: {sizes.ring}"),
    ]
    if memory.pinned:
        facts.append(("", f"about {format_size(CUDA_AND_NCCL_NBYTES)} more for CUDA and NCCL"))
        text = f"{format_size(memory.pinned)} on each rank that reads or writes files"
        text += "" if settings.readers == 1 else ", twice that where it does both"
        facts.append(("pinned memory", text))
    for limit in memory.limits[:1]:
        facts.append(("available", f"{format_size(limit.free)}, which {limit.name} leaves"))
    for space in found.spaces:
        free = "unknown" if space.free is None else format_size(space.free)
        copies = count(space.copies, "copy", "copies")
        facts.append(
            ("disk space", f"{format_size(space.needed)} for {copies}, {free} free at {space.path}")
        )
    blocks = [
        found.contents.files_table(),
        found.contents.totals(),
        printable(left_out_lines(found.beside)),
        table(("", ""), facts),
        "dry run: nothing was sent",
    ]
    return "\n\n".join(filter(None, blocks))


def _goes_to(settings: Settings) -> str:
    if settings.sink == "write":
        return f"{settings.target}, written"
    if settings.sink == "verify":
        return f"{settings.target}, compared; nothing is written"
    return "workers that check and drop it; nothing is written (give --out)"


def _modes(files: Sequence[FileSpec]) -> str:
    """`kept: 12 files 644, 2 files 600 (private)`; a mode without a bit for others is private."""

    def told(mode: int, num: int) -> str:
        private = "" if mode & 0o077 else " (private)"
        return f"{count(num, 'file')} {mode:03o}{private}"

    modes = Counter(file.mode for file in files)
    folders = sorted({file.folder_mode for file in files}, reverse=True)
    texts = [told(mode, num) for mode, num in modes.most_common(_MAX_MODES)]
    more = [f"{len(modes) - _MAX_MODES} other modes"] if len(modes) > _MAX_MODES else []
    return f"kept: {', '.join([*texts, *more])}; folders {', '.join(f'{m:03o}' for m in folders)}"


def _document(found: DryRun) -> dict[str, object]:
    contents = found.contents
    return {
        **ending("send", None),
        "dry_run": True,
        "checkpoint": {"path": str(found.checkpoint.path), **contents.document()},
        "files": [
            {
                "name": file.name,
                "kind": kind_of_file(file),
                "bytes": file.nbytes,
                "tensors": len(file.header.tensors) if file.header else 0,
            }
            for file in contents.files
        ],
        "left_out": [{"name": it.name, "reason": it.reason} for it in found.beside],
        "chunks": len(found.chunks),
        "buffers": {
            "size": found.fitted.sizes.buffer_size,
            "count": found.fitted.sizes.num_buffers,
            "staging": found.fitted.sizes.staging,
        },
        "device": found.memory.device,
        "device_bytes": found.memory.ring,
        "pinned_bytes": found.memory.pinned,
        "memory": [{"limit": it.name, "free_bytes": it.free} for it in found.memory.limits],
        "space": [
            {"path": it.path, "copies": it.copies, "bytes": it.needed, "free_bytes": it.free}
            for it in found.spaces
        ],
    }
