"""What the tests of the sinks share: small offers, and bytes to put."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import xxhash

from packcast.checkpoint.outgoing import FileSpec
from packcast.io.landing import Sink
from packcast.io.sinks.write import WriteSink
from packcast.io.work import Job, perform
from packcast.packed.plan import BLOCK, Extent

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


def specs(content: Mapping[str, bytes], *, executable: str = "") -> list[FileSpec]:
    return [
        FileSpec(name, len(data), MTIME_NS, name == executable, None)
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


def put(sink: Sink, file: int, offset: int, data: bytes | memoryview) -> None:
    """Have the sink take a run of bytes, in this thread."""
    extent, memory = Extent(file, offset, len(data)), memoryview(bytearray(data))
    spans = sink.lend(extent)
    job = Job(sink.task, extent.nbytes, spans, digests_of(memory))
    sink.take(extent, spans, memory, perform(job, memory))


def put_all(sink: WriteSink, content: Mapping[str, bytes] = CONTENT, step: int = 65_536) -> None:
    for index, (_, data) in enumerate(sorted(content.items())):
        for offset in range(0, len(data), step):
            put(sink, index, offset, data[offset : offset + step])


def in_threads(work: Callable[[T], object], each: Sequence[T]) -> None:
    """Do the work for each, in a thread of its own, and wait; what is raised there comes out."""
    with ThreadPoolExecutor(len(each)) as pool:
        list(pool.map(work, each))


def copy(target: Path, content: Mapping[str, bytes] = CONTENT, **options: object) -> WriteSink:
    """The whole life of a sink."""
    force = bool(options.get("force"))
    sink = sink_for(target, content, transfer_id=str(options.get("transfer_id", "t1")), force=force)
    sink.prepare()
    put_all(sink, content)
    sink.finish()
    sink.publish()
    return sink


def finished(
    target: Path,
    *,
    force: bool = False,
    in_place: bool = False,
    content: Mapping[str, bytes] = CONTENT,
    transfer_id: str = "t2",
) -> WriteSink:
    """A sink that has only to publish."""
    sink = sink_for(target, content, force=force, in_place=in_place, transfer_id=transfer_id)
    sink.prepare()
    put_all(sink, content)
    sink.finish()
    return sink


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
