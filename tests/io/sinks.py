"""What the tests of the sinks share: small offers, and bytes to put."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

import torch
import xxhash

from packcast.checkpoint.outgoing import FileSpec
from packcast.io.landing import Sink
from packcast.io.sinks.write import WriteSink
from packcast.io.unit_runner import UnitRunner
from packcast.packed.counters import Counters
from packcast.packed.plan import BLOCK, Chunk, Extent
from packcast.packed.ring import Ring

T = TypeVar("T")

MTIME_NS = 1_600_000_000_123_456_789
CONTENT = {
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 900,
    "model-00002-of-00002.safetensors": b"\x07" * 300_001,
    "model.safetensors.index.json": b"{}",
    "nested/deeper/vocab.txt": b"words",
}


def specs(content: Mapping[str, bytes]) -> list[FileSpec]:
    return [
        FileSpec(name, len(data), MTIME_NS, 0o644, 0o755, None)
        for name, data in sorted(content.items())
    ]


def sink_for(
    target: Path,
    content: Mapping[str, bytes] = CONTENT,
    *,
    transfer_id: str = "t1",
    force: bool = False,
    in_place: bool = False,
) -> WriteSink:
    return WriteSink(
        target, specs(content), transfer_id=transfer_id, force=force, in_place=in_place
    )


def digests_of(data: bytes | memoryview) -> bytes:
    blocks = (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))
    return b"".join(map(xxhash.xxh3_128_digest, blocks))


class Memory:
    """Stands for staging: all bytes at once, and nothing to give back."""

    unit_nbytes = 1 << 40

    def __init__(self, runs: Sequence[bytes]) -> None:
        self._begins = list(accumulate(map(len, runs), initial=0))
        self.memory = array("B", b"".join(runs))
        self.address, _ = self.memory.buffer_info()

    def place(self, chunk: Chunk, unit: int) -> int:
        return self._begins[chunk.index]

    def free(self, *, is_idle: bool) -> None: ...


class Putting:
    """Runs of bytes, each a file's index, an offset and data, on their way into a sink."""

    def __init__(self, sink: Sink, runs: Iterable[tuple[int, int, bytes]]) -> None:
        runs = [run for run in runs if run[2]]
        self._sink = sink
        chunks = [
            Chunk(i, 0, (Extent(file, offset, len(data)),), len(data), 0)
            for i, (file, offset, data) in enumerate(runs)
        ]
        self._num_units = len(chunks)
        self._runner = UnitRunner(
            sink.task,
            sink.stage,
            chunks,
            Memory([data for *_, data in runs]),
            spans_of=sink.spans,
            resources_of=sink.open_files,
            error_of=lambda schedule, it: sink.error_of(it, schedule.span(it.span)),
            num_threads=4,
            counters=Counters(),
        )
        self._runner.digests[:] = b"".join(digests_of(data) for *_, data in runs) or bytes(16)

    def run(self) -> None:
        """Until all are there; raises why they will not be."""
        try:
            self._runner.allow(self._num_units)
            self._runner.wait(self._num_units - 1)
            for index, offset in enumerate(self._runner.differences):
                if offset >= 0:
                    self._sink.compared(self._runner.schedule.span(index), offset)
        finally:
            self._runner.close(Ring(torch.device("cpu"), 1, 1))


def put(sink: Sink, file: int, offset: int, data: bytes) -> None:
    """Have the sink take a run of bytes."""
    Putting(sink, [(file, offset, data)]).run()


def runs_of(content: Mapping[str, bytes], step: int) -> list[tuple[int, int, bytes]]:
    return [
        (index, offset, data[offset : offset + step])
        for index, (_, data) in enumerate(sorted(content.items()))
        for offset in range(0, len(data), step)
    ]


def put_all(sink: Sink, content: Mapping[str, bytes] = CONTENT, step: int = 65_536) -> None:
    """Have the sink take all bytes."""
    Putting(sink, runs_of(content, step)).run()


def in_threads(work: Callable[[T], object], each: Sequence[T]) -> None:
    """Do the work for each, in a thread of its own, and wait; what is raised there comes out."""
    with ThreadPoolExecutor(len(each)) as pool:
        list(pool.map(work, each))


class Options(TypedDict, total=False):
    """What `sink_for` takes besides target and content."""

    transfer_id: str
    force: bool
    in_place: bool


def prepared(
    target: Path, content: Mapping[str, bytes] = CONTENT, **options: Unpack[Options]
) -> WriteSink:
    """A sink that has its partial directory, and no byte."""
    sink = sink_for(target, content, **options)
    sink.prepare()
    return sink


def filled(
    target: Path, content: Mapping[str, bytes] = CONTENT, **options: Unpack[Options]
) -> WriteSink:
    """A sink that has all bytes."""
    sink = prepared(target, content, **options)
    put_all(sink, content)
    return sink


def finished(
    target: Path, content: Mapping[str, bytes] = CONTENT, **options: Unpack[Options]
) -> WriteSink:
    """A sink that has only to publish."""
    sink = filled(target, content, **options)
    sink.finish()
    return sink


def copy(
    target: Path, content: Mapping[str, bytes] = CONTENT, **options: Unpack[Options]
) -> WriteSink:
    """The whole life of a sink."""
    sink = finished(target, content, **options)
    sink.publish()
    return sink


def failing(code: int) -> Callable[..., None]:
    """A system call that fails."""

    def call(*_args: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def damage(path: Path, *offsets: int) -> None:
    """Change these bytes of the file."""
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 0xFF
    path.write_bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_tree(folder: Path, content: Mapping[str, bytes]) -> None:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def without(content: Mapping[str, bytes], names: Sequence[str]) -> dict[str, bytes]:
    return {name: data for name, data in content.items() if name not in names}
