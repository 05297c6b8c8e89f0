"""What the stages of a row reach at the same time, without packcast: the row's limit.

The row's own files are read, broadcast and written as it does that, by the loop of bare.py.
"""

from __future__ import annotations

import os
import shutil
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from packcast.bench.bare import DeviceLoop, HostLoop, Loop
from packcast.bench.limits import Pace, Start, reserve
from packcast.bench.model import BenchSink
from packcast.bench.pagecache import evict
from packcast.bench.team import Team
from packcast.errors import PackcastError
from packcast.io.schedule import IN_MEMORY, Span, SpansOf
from packcast.io.work import Task
from packcast.packed.plan import Chunk, Extent, plan_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Which stages run: chunks from `readers` in turn, to the `sink` of every other rank.

    `files` are the names and sizes of what is read, on all ranks alike; of them the first
    `limit_nbytes` or a little more are moved. `staging_nbytes` is pinned, at most, beside a GPU.
    """

    sink: BenchSink
    readers: tuple[int, ...]
    files: tuple[tuple[str, int], ...]
    limit_nbytes: int
    buffer_size: int
    num_buffers: int
    read_threads: int
    write_threads: int
    staging_nbytes: int

    def chunks(self) -> list[Chunk]:
        """What is broadcast, the same on every rank."""
        chosen, nbytes = [], 0
        sizes = [nbytes for _, nbytes in self.files]
        for chunk in plan_chunks(sizes, self.buffer_size, self.readers):
            chosen.append(chunk)
            nbytes += chunk.nbytes
            if nbytes >= self.limit_nbytes:
                break
        return chosen


def pace_together(
    team: Team,
    start: Start,
    what: Together,
    paths: Mapping[str, Path],
    folder: Path,
    *,
    cold: bool,
) -> Pace:
    """One rank's part; all ranks call it. `paths` are the files' on this host, by name, where it
    reads; `folder`, made here and removed again, is where it writes. With fsync."""
    chunks = what.chunks()
    with ExitStack() as ending:
        failure: Exception | None = None
        loop: Loop | None = None
        try:
            loop = _make_loop(team, what, chunks, paths, folder, ending, cold=cold)
        except Exception as error:
            failure = error
        start()
        _all_are_ready(team, failure)
        assert loop is not None, "or this rank has failed"
        team.start_together()
        began = time.perf_counter()
        failure = loop.run(chunks)
        if failure is not None:
            raise failure
        seconds = time.perf_counter() - began
        loop.check()
    return Pace(sum(chunk.nbytes for chunk in chunks), seconds)


def _all_are_ready(team: Team, failure: Exception | None) -> None:
    """Raise on all ranks where one of them could not begin: it would be waited for for good."""
    failed = []
    for rank in range(team.world_size):
        word = torch.tensor([rank == team.rank and failure is not None], dtype=torch.uint8)
        word = word.to(team.device)
        team.broadcast(word, rank)
        if word.item():
            failed.append(rank)
    if failure is not None:
        raise failure
    if failed:
        raise PackcastError(f"rank {failed[0]} could not begin")


def _make_loop(
    team: Team,
    what: Together,
    chunks: Sequence[Chunk],
    paths: Mapping[str, Path],
    folder: Path,
    ending: ExitStack,
    *,
    cold: bool,
) -> Loop:
    """This rank's loop, ready to run; `ending` gives back what it needs."""
    mine = [chunk for chunk in chunks if chunk.root == team.rank]
    sink = "discard" if team.is_sender else what.sink
    sources = array("i", [-1])
    if mine or sink == "verify":
        names = [name for name, _ in what.files]
        if missing := [name for name in names if name not in paths]:
            raise PackcastError(f"{missing[0]} is not on this host")
        if cold:
            evict(paths[name] for name in names)
        sources = _opened((paths[name] for name in names), os.O_RDONLY, ending)
    copies = _made_files(chunks, len(what.files), folder, ending) if sink == "write" else sources
    target: torch.Tensor | None = None
    if sink == "land":
        nbytes = sum(chunk.nbytes for chunk in chunks)
        target = torch.zeros(nbytes, dtype=torch.uint8, device=team.device)
    spans = _spans_in(target) if target is not None else _spans
    task = Task.COMPARE if sink == "verify" else Task.WRITE

    loop: Loop
    sizes, written = (what.num_buffers, what.buffer_size), copies if sink == "write" else ()
    if team.device.type == "cpu":
        loop = HostLoop(team, *sizes, mine, target=target, written=written)
    else:
        num_ends = (mine != []) + (sink in ("write", "verify"))
        staging = what.staging_nbytes // max(1, num_ends)
        loop = DeviceLoop(
            team, *sizes, mine, target=target, written=written, staging_nbytes=staging
        )
    if mine:
        loop.reading = loop.start(Task.READ, mine, _spans, sources, what.read_threads, ending)
    if sink != "discard" and not (sink == "land" and isinstance(loop, DeviceLoop)):
        loop.writing = loop.start(task, chunks, spans, copies, what.write_threads, ending)
    return loop


def _spans(extent: Extent) -> Iterable[Span]:
    return (Span(extent.file, extent.offset, 0, extent.nbytes),)


def _spans_in(memory: torch.Tensor) -> SpansOf:
    """One extent after the other into memory, as they come."""
    at = memory.data_ptr()

    def spans_of(extent: Extent) -> Iterable[Span]:
        nonlocal at
        at += extent.nbytes
        return (Span(IN_MEMORY, at - extent.nbytes, 0, extent.nbytes),)

    return spans_of


def _opened(paths: Iterable[Path], flags: int, ending: ExitStack) -> array[int]:
    descriptors = array("i")
    for path in paths:
        descriptors.append(os.open(path, flags | os.O_CLOEXEC, 0o600))
        ending.callback(os.close, descriptors[-1])
    return descriptors


def _made_files(chunks: Sequence[Chunk], count: int, folder: Path, ending: ExitStack) -> array[int]:
    """New files with room for what will be written."""
    folder.mkdir(parents=True)
    ending.callback(shutil.rmtree, folder, ignore_errors=True)
    sizes = [0] * count
    for chunk in chunks:
        for extent in chunk.extents:
            sizes[extent.file] = max(sizes[extent.file], extent.offset + extent.nbytes)
    names = (folder / str(index) for index in range(count))
    descriptors = _opened(names, os.O_WRONLY | os.O_CREAT | os.O_EXCL, ending)
    for descriptor, nbytes in zip(descriptors, sizes, strict=True):
        if nbytes:
            reserve(descriptor, nbytes)
    return descriptors
