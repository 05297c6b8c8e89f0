"""Real files through the whole path into real sinks, by threads and by helper processes alike."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.errors import CheckpointError, DestinationError, TransferError
from packcast.io import descriptors, landing, source, syscalls
from packcast.io.pinned import Arena
from packcast.io.sinks.verify import VerifySink, local_copy
from packcast.io.sinks.write import WriteSink
from packcast.io.staging import Buffers, PinnedStaging
from packcast.packed.plan import PAGE, trailer_nbytes
from tests.helpers.checkpoints import sharded, write_safetensors
from tests.helpers.disks import small_tmpfs
from tests.helpers.processes import num_descriptors
from tests.helpers.sinks import MemorySink
from tests.io.alone import run_alone, specs_of
from tests.io.sinks import names_in, tree

MIB = 1 << 20


@pytest.fixture(params=["threads", "processes"])
def helpers(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "processes")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    folder = sharded(tmp_path / "c", 3, 5 * MIB, seed=4)
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from small_tmpfs(tmp_path / "disk", 4 * MIB)


def writing(checkpoint: Checkpoint, target: Path) -> WriteSink:
    sink = WriteSink(target, specs_of(checkpoint), transfer_id="t", force=False)
    sink.prepare()
    return sink


@pytest.mark.parametrize("buffer_mib", [1, 16])
def test_a_copy_is_written_to_the_byte(
    checkpoint: Checkpoint, tmp_path: Path, helpers: bool, buffer_mib: int
) -> None:
    sink = writing(checkpoint, tmp_path / "out")
    num_before = num_descriptors()
    run_alone(checkpoint, sink, helpers=helpers, buffer_size=buffer_mib * MIB)
    assert num_descriptors() <= num_before + len(checkpoint.files)
    sink.finish()
    sink.publish()
    assert tree(tmp_path / "out") == tree(checkpoint.path)


def test_more_files_than_may_be_open_are_written_all_the_same(
    tmp_path: Path, helpers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "MAX_OPEN_FILES", 2)
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 9, 200_000, seed=1))
    sink = writing(checkpoint, tmp_path / "out")
    run_alone(checkpoint, sink, helpers=helpers)
    sink.finish()
    sink.publish()
    assert tree(tmp_path / "out") == tree(checkpoint.path)


def test_an_equal_copy_verifies_and_a_changed_byte_is_named(
    checkpoint: Checkpoint, tmp_path: Path, helpers: bool
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.path, copy)
    files = specs_of(checkpoint)

    def verified() -> VerifySink:
        sink = VerifySink(local_copy(copy, files), files)
        sink.prepare()
        run_alone(checkpoint, sink, helpers=helpers, buffer_size=16 * MIB)
        sink.finish()
        return sink

    assert verified().difference is None
    victim = [file for file in files if file.header][-1]
    assert victim.header
    tensor = victim.header.tensors[-1]
    data = bytearray((copy / victim.name).read_bytes())
    for at in (tensor.end - 1, tensor.begin + 1):
        data[at] ^= 1
    (copy / victim.name).write_bytes(data)
    sink = verified()
    found = sink.difference
    assert found is not None
    assert (found.file, found.tensor) == (victim.name, tensor.name)
    assert found.offset == tensor.begin + 1
    assert sink.differing_tensors == 1


def test_a_disk_that_fills_up_meanwhile_names_the_file(
    checkpoint: Checkpoint, small_disk: Path, helpers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patched:
        patched.setattr(syscalls, "fallocate", unsupported)
        patched.setattr("packcast.io.sinks.space.free_nbytes", lambda _: 1 << 40)
        patched.setattr("packcast.io.sinks.write.free_nbytes", lambda _: 1 << 40)
        sink = writing(checkpoint, small_disk / "out")
    says = r"cannot write .*/out/.*safetensors: no space left"
    with pytest.raises(DestinationError, match=says) as caught:
        run_alone(checkpoint, sink, helpers=helpers)
    assert "--out" in str(caught.value.hint)
    sink.abort()
    assert names_in(small_disk) == []


def test_a_source_that_is_cut_while_it_is_read_is_named_with_the_byte(
    tmp_path: Path, helpers: bool
) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": ("U8", (12 * MIB,))})
    checkpoint = open_checkpoint(path)

    def cut(_: torch.Tensor) -> None:
        os.truncate(path, 3 * MIB)

    sink = MemorySink(specs_of(checkpoint), lambda *_: None)
    says = r"m\.safetensors (ended at byte \d+|changed) while it was being sent"
    with pytest.raises(CheckpointError, match=says):
        run_alone(checkpoint, sink, helpers=helpers, spoil=cut)


def test_damage_on_the_way_names_file_place_and_tensor_and_is_not_written(
    tmp_path: Path, helpers: bool
) -> None:
    write_safetensors(tmp_path / "c" / "m.safetensors", {"w": ("U8", (6 * MIB,))})
    checkpoint = open_checkpoint(tmp_path / "c")
    sink = writing(checkpoint, tmp_path / "out")
    seen: list[int] = []

    def damage(tensor: torch.Tensor) -> None:
        seen.append(len(seen))
        if len(seen) == 3:
            tensor[100] ^= 1

    says = r"m\.safetensors: bytes 2097152 to 3145728 \(tensor w\) were damaged on the way, chunk 2"
    with pytest.raises(TransferError, match=says):
        run_alone(checkpoint, sink, helpers=helpers, spoil=damage)
    written = (tmp_path / ".out.packcast-t" / "m.safetensors").read_bytes()
    assert written[2 * MIB : 3 * MIB] == bytes(MIB)
    sink.abort()


@pytest.mark.parametrize("num_units", [1, 2, 5])
def test_chunks_of_many_units_go_through_however_little_staging_there_is(
    checkpoint: Checkpoint,
    tmp_path: Path,
    helpers: bool,
    num_units: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As beside a GPU: memory of its own between files and slots, here without the pinning."""
    unit = 2 * MIB
    stagings: list[PinnedStaging] = []

    def staged(buffers: Buffers) -> PinnedStaging:
        nbytes = unit + PAGE + trailer_nbytes(buffers.buffer_size)
        arena = Arena(num_units * nbytes, is_pinned=False)
        arena.tensor.fill_(0x5A)
        stagings.append(PinnedStaging(arena, nbytes, unit))
        return stagings[-1]

    for end in (source, landing):
        monkeypatch.setattr(end, "make_staging", staged)
    sink = MemorySink(specs_of(checkpoint), lambda *_: None)
    run_alone(checkpoint, sink, helpers=helpers, buffer_size=9 * MIB)
    for spec, got in zip(specs_of(checkpoint), sink.bytes, strict=True):
        assert (checkpoint.path / spec.name).read_bytes() == bytes(got), spec.name
    assert [staging.arena.fd for staging in stagings] == [-1, -1]  # given back
