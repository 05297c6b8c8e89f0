"""Real files through the whole path into real sinks, and what goes wrong on the way."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.errors import CheckpointError, DestinationError, PackcastError, TransferError
from packcast.io import files as open_files
from packcast.io import syscalls
from packcast.io.digests import BlockDigests
from packcast.io.landing import Sink
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.localcopy import local_copy
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.packed.plan import DIGEST_NBYTES, PAGE
from tests.helpers.checkpoints import sharded, write_safetensors
from tests.helpers.processes import num_descriptors
from tests.helpers.sinks import MemorySink
from tests.io.alone import run_alone, specs_of
from tests.io.cuda import Cudart
from tests.io.pools import no_thread_left
from tests.io.sinks import digests_of, failing, names_in, tree

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("pool")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    folder = sharded(tmp_path / "c", 3, 5 * MIB, seed=4)
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)


@pytest.fixture
def single(tmp_path: Path) -> Checkpoint:
    """One file of a little more than six blocks."""
    write_safetensors(tmp_path / "single" / "m.safetensors", {"w": ("U8", (6 * MIB,))})
    return open_checkpoint(tmp_path / "single")


def writing(checkpoint: Checkpoint, target: Path) -> WriteSink:
    sink = WriteSink(target, specs_of(checkpoint), transfer_id="t", force=False)
    sink.prepare()
    return sink


@pytest.mark.parametrize(("buffer_mib", "staging_mib"), [(1, 0), (16, 0), (1, 3), (16, 17)])
def test_a_copy_is_written_to_the_byte(
    checkpoint: Checkpoint, tmp_path: Path, buffer_mib: int, staging_mib: int, cudart: Cudart
) -> None:
    num_before = num_descriptors()
    sink = writing(checkpoint, tmp_path / "out")
    with no_thread_left():
        run_alone(checkpoint, sink, buffer_size=buffer_mib * MIB, staging_nbytes=staging_mib * MIB)
    sink.finish()
    sink.publish()
    assert tree(tmp_path / "out") == tree(checkpoint.path)
    assert num_descriptors() == num_before
    assert cudart.pinned == []


@pytest.mark.parametrize(("limit", "staging_mib"), [(1, 0), (5, 0), (1, 5)])
def test_many_more_files_than_may_be_open_are_sent_written_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cudart: Cudart, limit: int, staging_mib: int
) -> None:
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", limit)
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 40, 20_000, seed=1))
    most: list[int] = []
    num_before = num_descriptors()

    def watch(_: torch.Tensor) -> None:
        most.append(num_descriptors() - num_before)

    sink = writing(checkpoint, tmp_path / "out")
    run_alone(checkpoint, sink, spoil=watch, staging_nbytes=staging_mib * MIB)
    sink.finish()
    sink.publish()
    assert tree(tmp_path / "out") == tree(checkpoint.path)
    verified = VerifySink(local_copy(tmp_path / "out", specs_of(checkpoint)), specs_of(checkpoint))
    verified.prepare()
    run_alone(checkpoint, verified, spoil=watch)
    verified.finish()
    assert verified.difference is None
    # A chunk of this plan has at most all 44 small files, which then have to be open together.
    assert max(most) <= 2 * (44 + limit) + 4
    assert num_descriptors() == num_before


def test_differences_are_told_by_tensor_with_the_first_byte(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.path, copy)
    files = specs_of(checkpoint)

    def verified() -> VerifySink:
        sink = VerifySink(local_copy(copy, files), files)
        sink.prepare()
        run_alone(checkpoint, sink, buffer_size=16 * MIB)
        sink.finish()
        return sink

    assert verified().difference is None
    shards = [file for file in files if file.header]
    for shard, name in ((shards[1], 2), (shards[2], 0), (shards[2], 1)):
        assert shard.header
        tensor = shard.header.tensors[name]
        data = bytearray((copy / shard.name).read_bytes())
        for at in (tensor.end - 1, tensor.begin + 1):
            data[at] ^= 1
        (copy / shard.name).write_bytes(data)
    sink = verified()
    found = sink.difference
    assert found is not None
    assert shards[1].header
    first = shards[1].header.tensors[2]
    assert (found.file, found.tensor, found.offset) == (
        shards[1].name,
        first.name,
        first.begin + 1,
    )
    assert (sink.differing_tensors, sink.differing_files) == (3, 2)


# -- what goes wrong -----------------------------------------------------------------------------


def fails(
    checkpoint: Checkpoint,
    sink: Sink,
    kind: type[PackcastError],
    says: str,
    spoil: Callable[[torch.Tensor], object] = lambda _: None,
    *,
    staging_nbytes: int = 0,
) -> PackcastError:
    """Send it, expect that error, and nothing left but what the sink removes."""
    num_before = num_descriptors()
    with no_thread_left(), pytest.raises(kind, match=says) as caught:
        run_alone(checkpoint, sink, spoil=spoil, staging_nbytes=staging_nbytes)
    sink.abort()
    assert num_descriptors() <= num_before
    return caught.value


def test_a_disk_that_fills_up_meanwhile_names_the_file(
    checkpoint: Checkpoint, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(syscalls, "fallocate", failing(errno.EOPNOTSUPP))
        patched.setattr("packcast.io.sinks.write.free_nbytes", lambda _: 1 << 40)
        sink = writing(checkpoint, small_disk / "out")
    says = r"cannot write .*/out/.*safetensors: no space left"
    error = fails(checkpoint, sink, DestinationError, says)
    assert "--out" in str(error.hint)
    assert names_in(small_disk) == []


@pytest.mark.parametrize("change", ["shrinks", "is touched", "is replaced", "goes"])
@pytest.mark.parametrize(("at_chunk", "staging_mib"), [(0, 0), (3, 0), (3, 3)])
def test_a_source_that_changes_is_named_and_no_death(
    single: Checkpoint, cudart: Cudart, change: str, at_chunk: int, staging_mib: int
) -> None:
    path = single.path / "m.safetensors"

    def spoil(_: torch.Tensor) -> None:
        if change == "shrinks":
            os.truncate(path, 2 * MIB)
        elif change == "is touched":
            os.utime(path, ns=(1, 1))
        elif change == "is replaced":
            (path.parent / "new").write_bytes(path.read_bytes())
            (path.parent / "new").rename(path)
        else:
            path.unlink()

    sink = MemorySink(specs_of(single))
    says = r"^m\.safetensors (ended at byte \d+|changed) while it was being sent"
    staging_nbytes = staging_mib * MIB
    fails(single, sink, CheckpointError, says, at(at_chunk, spoil), staging_nbytes=staging_nbytes)
    assert cudart.pinned == []


def test_a_source_that_has_shrunk_before_is_named_before_any_byte_is_read(
    single: Checkpoint,
) -> None:
    os.truncate(single.path / "m.safetensors", 2 * MIB)
    says = r"m\.safetensors changed while it was being sent"
    fails(single, MemorySink(specs_of(single)), CheckpointError, says)


def test_a_source_that_ends_while_it_is_open_is_named_with_the_byte(
    single: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(unit: object) -> None:
        os.truncate(single.path / "m.safetensors", 2 * MIB + 77)

    sink = MemorySink(specs_of(single), lambda _, offset: cut(offset))
    says = r"m\.safetensors (ended at byte 2097229|changed) while it was being sent"
    fails(single, sink, CheckpointError, says)


def at(chunk: int, do: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], object]:
    """Something that befalls the chunk on its way."""
    seen: list[int] = []

    def spoil(tensor: torch.Tensor) -> None:
        seen.append(len(seen))
        if len(seen) == chunk + 1:
            do(tensor)

    return spoil


def flip(byte: int) -> Callable[[torch.Tensor], object]:
    def spoil(tensor: torch.Tensor) -> None:
        tensor[byte] ^= 1

    return spoil


def test_damage_on_the_way_names_file_place_and_tensor_and_is_not_written(
    single: Checkpoint, tmp_path: Path
) -> None:
    sink = writing(single, tmp_path / "out")
    says = r"m\.safetensors: bytes 2097152 to 3145728 \(tensor w\) were damaged in transit, chunk 2"
    with pytest.raises(TransferError, match=says):
        run_alone(single, sink, spoil=at(2, flip(100)))
    written = (tmp_path / ".out.packcast-t" / "m.safetensors").read_bytes()
    assert written[2 * MIB : 3 * MIB] == bytes(MIB)
    sink.abort()


def test_a_damaged_block_of_many_files_in_a_chunk_is_named_by_its_own(
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "c", 5, 100_000, index=False))
    specs = specs_of(checkpoint)
    small = [spec.nbytes for spec in specs if spec.nbytes]
    victim = [spec.name for spec in specs if spec.nbytes][3]
    byte = sum(small[:3]) + 5
    says = rf"{victim}: bytes 0 to {small[3]} .*damaged in transit, chunk 0"
    fails(checkpoint, MemorySink(specs), TransferError, says, at(0, flip(byte)))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (8 - PAGE, "chunk 1 is not of this transfer"),
        (81 - PAGE, "trailer of chunk 1 was damaged"),
    ],
)
def test_a_damaged_trailer_is_found(single: Checkpoint, place: int, says: str) -> None:
    fails(single, MemorySink(specs_of(single)), TransferError, says, at(1, flip(place)))


@pytest.mark.parametrize(
    ("chunk", "by", "says"), [(4, 2, "chunk 4 came.*chunk 2"), (1, 0, "chunk 1 came.*chunk 0")]
)
def test_a_stale_slot_and_a_reordered_chunk_are_found(
    single: Checkpoint, chunk: int, by: int, says: str
) -> None:
    seen: list[torch.Tensor] = []

    def spoil(tensor: torch.Tensor) -> None:
        seen.append(tensor.clone())
        if len(seen) == chunk + 1:
            tensor.copy_(seen[by])

    fails(single, MemorySink(specs_of(single)), TransferError, says, spoil)


@pytest.mark.parametrize("place", [500_001, 8 - PAGE])
def test_a_tolerant_landing_goes_on_without_the_digests_of_what_was_damaged(
    single: Checkpoint, place: int
) -> None:
    sink = DiscardSink()
    landing = run_alone(single, sink, spoil=at(1, flip(place)), tolerant=True)
    found: BlockDigests = landing.digests()
    whole = digests_of((single.path / "m.safetensors").read_bytes())
    none = bytes(DIGEST_NBYTES)
    assert found.of_blocks() == [whole[:DIGEST_NBYTES] + none + whole[2 * DIGEST_NBYTES :]]


def test_a_sink_that_fails_ends_the_transfer_with_its_own_error(single: Checkpoint) -> None:
    def full(file: int, offset: int) -> None:
        if offset >= 2 * MIB:
            raise DestinationError("this sink is full")

    fails(single, MemorySink(specs_of(single), full), DestinationError, "this sink is full")


def test_a_bug_is_raised_as_it_is_and_leaves_nothing(single: Checkpoint) -> None:
    def broken(file: int, offset: int) -> None:
        raise ZeroDivisionError

    num_before = num_descriptors()
    with no_thread_left(), pytest.raises(ZeroDivisionError):
        run_alone(single, MemorySink(specs_of(single), broken))
    assert num_descriptors() == num_before
