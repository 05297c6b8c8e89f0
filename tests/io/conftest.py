"""Both pools: what is claimed here of the data path is claimed of each."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from packcast.io import copies, native, pinned
from packcast.io.threads import ThreadPool
from packcast.packed.streams import Stream, StreamEvent
from tests.helpers.disks import small_tmpfs
from tests.helpers.held_disk.sitecustomize import hold_reads
from tests.helpers.native import HELD_READS, built
from tests.io.cuda import Cudart
from tests.io.pools import Gate, Opened

JITTER_NS = 300_000


@pytest.fixture(autouse=True, scope="session")
def _no_threads_of_torch() -> Iterator[None]:
    """Threads are counted here: torch is not to begin some for its own work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def use_native(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Path:
    """Have this process use a native pool that is compiled now; skips without a compiler."""
    library = built(*flags)
    if library is None:
        pytest.skip("there is no C compiler for the native pool")
    opened = native.open_library(library)
    monkeypatch.setattr(native, "installed", lambda: opened)
    return library


@pytest.fixture(params=["native", "python"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind that this test's I/O threads are of."""
    kind = str(request.param)
    monkeypatch.setenv("PACKCAST_POOL", kind)
    if kind == "native":
        use_native(monkeypatch)
    return kind


@pytest.fixture
def pauses(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I/O threads that dawdle, each time before they begin."""
    if pool == "native":
        use_native(monkeypatch, f"-DPACKCAST_JITTER_NS={JITTER_NS}")
        return
    really_do = ThreadPool._do_grain

    def dawdle(self: ThreadPool, index: int, first: int, last: int) -> None:
        time.sleep(random.random() * JITTER_NS / 1e9)
        really_do(self, index, first, last)

    monkeypatch.setattr(ThreadPool, "_do_grain", dawdle)


@pytest.fixture
def held_reads(
    pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Gate]]:
    """Once called, a read does not return that brings more than so many bytes in all; see Gate."""
    gates: list[Gate] = []
    monkeypatch.setattr(os, "preadv", os.preadv)  # put back in the end

    def hold(after: int) -> Gate:
        gate = Gate(tmp_path / f"gate-{len(gates)}")
        gates.append(gate)
        library = None
        if pool == "native":
            library = str(use_native(monkeypatch, "-include", str(HELD_READS)))
        hold_reads(gate.folder, after, library)
        return gate

    yield hold
    for gate in gates:
        gate.open()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    yield from small_tmpfs(tmp_path / "disk", 4 << 20)


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Makes a file with that content; a descriptor for both directions."""
    with ExitStack() as stack:

        def open_file(path: Path, content: bytes) -> int:
            path.write_bytes(content)
            fd = os.open(path, os.O_RDWR)
            stack.callback(os.close, fd)
            return fd

        yield open_file


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudart]:
    """Memory that counts as pinned, and copies that the native pool begins, without CUDA; no memory
    is kept from one test to the next."""
    made = Cudart()
    device = made.device
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(copies, "cuda_driver", lambda: device.driver)
    monkeypatch.setattr(Stream, "handle", property(id))
    monkeypatch.setattr(StreamEvent, "handle", property(id))
    really_record = Stream.record

    def record(stream: Stream) -> StreamEvent:
        device.pass_all(id(stream))
        return really_record(stream)

    monkeypatch.setattr(Stream, "record", record)
    kept = dict(pinned._abandoned)
    yield made
    pinned._abandoned.clear()
    pinned._abandoned.update(kept)
