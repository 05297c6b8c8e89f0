"""VerifySink: finds the first difference, counts tensors, and writes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import FileSpec, SourceRun, outgoing_files
from packcast.errors import CheckpointError, TransferError
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.localcopy import local_copy
from packcast.io.sinks.verify import VerifySink
from tests.helpers.processes import num_descriptors
from tests.io.sinks import damage, put

pytestmark = pytest.mark.usefixtures("pool")

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    folder = tmp_path / "sent"
    folder.mkdir()
    rng = np.random.default_rng(0)
    first = {f"a.{i}": rng.integers(0, 255, 70_001, dtype=np.uint8) for i in range(3)}
    save_file(first, folder / ONE)
    save_file(
        {f"b.{i}": rng.random(200_000) for i in range(2)} | {"empty": np.zeros(0)}, folder / TWO
    )
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def here(sent: Path, tmp_path: Path) -> Path:
    """A copy of what is sent, to be damaged."""
    folder = tmp_path / "here"
    folder.mkdir()
    for path in sent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def specs(checkpoint: Checkpoint) -> list[FileSpec]:
    return [
        FileSpec(file.name, file.nbytes, file.mtime_ns, file.mode, file.folder_mode, file.header)
        for file in checkpoint.files
    ]


def compared(sent: Path, here: Path, *, step: int = 1 << 20, backwards: bool = False) -> VerifySink:
    offered = open_checkpoint(sent)
    sink = VerifySink(open_checkpoint(here), specs(offered))
    sink.prepare()
    contents = [memoryview(bytearray(file.path.read_bytes())) for file in offered.files]
    runs = [
        (index, offset, data[offset : offset + step])
        for index, data in enumerate(contents)
        for offset in range(0, len(data), step)
    ]
    for run in reversed(runs) if backwards else runs:
        put(sink, *run)
    sink.finish()
    sink.publish()
    return sink


def begin_of(folder: Path, name: str, tensor: str) -> int:
    (file,) = (file for file in open_checkpoint(folder).files if file.name == name)
    assert file.header
    return next(entry.begin for entry in file.header.tensors if entry.name == tensor)


def test_an_equal_checkpoint_has_no_difference(sent: Path, here: Path) -> None:
    sink = compared(sent, here)
    assert sink.difference is None
    assert sink.sentence() is None
    assert (sink.differing_tensors, sink.differing_files, sink.notes) == (0, 0, [])
    assert sink.result()["equal"] is True


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("step", [1 << 20, 65_536, 9_999])
def test_the_first_difference_is_named_whatever_came_first(
    sent: Path, here: Path, step: int, backwards: bool
) -> None:
    first = begin_of(sent, ONE, "a.1") + 12
    damage(here / ONE, first, first + 1, first + 30_000)
    damage(here / TWO, begin_of(sent, TWO, "b.0"), begin_of(sent, TWO, "b.1") + 1_234_567)
    sink = compared(sent, here, step=step, backwards=backwards)
    found = sink.difference
    assert found is not None
    assert (found.file, found.tensor, found.offset) == (ONE, "a.1", first)
    assert sink.sentence() == (
        f"{ONE} differs at byte {first:,} (tensor a.1, its byte 12); 3 of 6 tensors differ"
    )
    assert (sink.differing_tensors, sink.differing_files) == (3, 2)


def test_neighbours_of_a_damaged_tensor_are_not_blamed(sent: Path, here: Path) -> None:
    begin = begin_of(sent, ONE, "a.1")
    damage(here / ONE, begin, begin + 70_000)  # its first byte and its last
    sink = compared(sent, here)
    assert str(sink.sentence()).endswith("(tensor a.1, its byte 0); 1 of 6 tensors differs")


def test_every_single_byte_is_compared(tmp_path: Path) -> None:
    for folder in ("sent", "here"):
        (tmp_path / folder).mkdir()
        save_file({"t": np.zeros(64, np.uint8)}, tmp_path / folder / "m.safetensors")
    nbytes = (tmp_path / "sent/m.safetensors").stat().st_size
    checkpoint = open_checkpoint(tmp_path / "here")
    data = (tmp_path / "sent/m.safetensors").read_bytes()
    for offset in range(nbytes):
        changed = bytearray(data)
        changed[offset] ^= 1
        sink = VerifySink(checkpoint, specs(checkpoint))
        sink.prepare()
        put(sink, 0, 0, memoryview(changed)[:37])
        put(sink, 0, 37, memoryview(bytes(changed))[37:])
        sink.finish()
        assert sink.difference is not None
        assert sink.difference.offset == offset


def test_headers_and_sidecars_are_compared_as_well(sent: Path, here: Path) -> None:
    save_file({"t": np.zeros(3, np.uint8)}, sent / ONE, {"note": "x"})
    save_file({"t": np.zeros(3, np.uint8)}, here / ONE, {"note": "y"})
    assert "(in its header); 1 of 3 files differs" in str(compared(sent, here).sentence())
    (here / ONE).write_bytes((sent / ONE).read_bytes())
    (here / "config.json").write_text("[]")
    sink = compared(sent, here)
    assert sink.sentence() == "config.json differs at byte 0; 1 of 3 files differs"
    assert sink.differing_tensors == 0


def test_a_missing_file_is_a_difference_and_its_tensors_too(sent: Path, here: Path) -> None:
    (here / TWO).unlink()
    sink = compared(sent, here)
    assert sink.sentence() == f"{TWO} is missing here; 3 of 6 tensors differ"
    (here / "config.json").unlink()
    sink = compared(sent, here)
    assert sink.sentence() == f"config.json, {TWO} are missing here; 3 of 6 tensors differ"
    assert sink.result()["missing"] == ["config.json", TWO]
    assert [file.mark for file in sink.comparison().files] == ["-", "=", "-"]


def test_what_is_missing_hides_no_damage_beside_it(sent: Path, here: Path) -> None:
    (here / "config.json").unlink()
    damage(here / TWO, -1)
    sink = compared(sent, here)
    assert str(sink.sentence()).startswith(f"config.json is missing here; {TWO} differs at byte ")
    assert (sink.result()["missing"], sink.result()["differing"]) == (["config.json"], [TWO])
    assert [file.name for file in sink.comparison().marked("*")] == [TWO]
    assert len(sink.comparison().marked("*")[0].tensors_marked("*")) == 1


def test_a_file_of_another_size_is_a_difference(sent: Path, here: Path) -> None:
    (here / "config.json").write_text("{} ")
    assert compared(sent, here).sentence() == (
        "config.json has 3 bytes here and 2 in the offer; 1 of 3 files differs"
    )
    (here / "config.json").write_text("[")
    assert compared(sent, here).sentence() == (
        "config.json differs at byte 0, and has 1 bytes here, 2 in the offer; 1 of 3 files differs"
    )


def test_an_extra_local_shard_is_a_note(sent: Path, here: Path) -> None:
    save_file({"c": np.zeros(3)}, here / "model-00003-of-00003.safetensors")
    sink = compared(sent, here)
    assert sink.difference is None
    assert sink.notes == [f"{here} also has model-00003-of-00003.safetensors, not compared"]
    (here / "extra.json").write_text("{}")
    sink = compared(sent, here)
    extra = ["extra.json", "model-00003-of-00003.safetensors"]
    assert sink.notes == [f"{here} also has {', '.join(extra)}, not compared"]
    assert sink.result()["extra"] == extra


def test_a_single_file_is_compared_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"t": np.arange(9)}, tmp_path / name)
    assert compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors").difference is None
    damage(tmp_path / "b.safetensors", -1)
    sink = compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert str(sink.sentence()).startswith("a.safetensors differs at byte ")


@pytest.mark.parametrize("change", ["touch", "truncate", "replace"])
def test_a_local_file_that_changes_meanwhile_is_no_verdict(
    sent: Path, here: Path, change: str
) -> None:
    offered = open_checkpoint(sent)
    sink = VerifySink(open_checkpoint(here), specs(offered))
    sink.prepare()
    data = memoryview(bytearray((sent / "config.json").read_bytes()))
    file = [entry.name for entry in offered.files].index("config.json")
    path = here / "config.json"
    if change == "touch":
        put(sink, file, 0, data)
        os.utime(path, ns=(1, 1))
    elif change == "truncate":
        sink._table.open(file)
        os.truncate(path, 0)
        with pytest.raises(CheckpointError, match="became shorter"):
            put(sink, file, 0, data)
    else:
        (here / "new").write_bytes(path.read_bytes())
        (here / "new").rename(path)
        with pytest.raises(CheckpointError, match="changed while"):
            put(sink, file, 0, data)
    with pytest.raises(CheckpointError, match="changed while"):
        sink.finish()


def test_a_file_that_cannot_be_read_is_an_error_and_not_a_difference(
    sent: Path, here: Path
) -> None:
    sink = VerifySink(open_checkpoint(here), specs(open_checkpoint(sent)))
    sink.prepare()
    folder = os.open(here, os.O_RDONLY)
    os.dup2(folder, sink._table.open(0))
    os.close(folder)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: Is a directory"):
        put(sink, 0, 0, b"{}")
    assert sink.difference is None
    sink.abort()


def test_after_abort_nothing_is_compared_and_no_descriptor_stays_open(
    sent: Path, here: Path
) -> None:
    num_before = num_descriptors()
    sink = VerifySink(open_checkpoint(here), specs(open_checkpoint(sent)))
    sink.prepare()
    put(sink, 0, 0, b"{}")
    sink.abort()
    sink.abort()
    with pytest.raises(TransferError, match="aborted"):
        put(sink, 0, 0, b"!!")
    assert sink.difference is None
    assert num_descriptors() == num_before


def test_the_discarding_sink_takes_everything_and_keeps_nothing() -> None:
    sink = DiscardSink()
    sink.prepare()
    put(sink, 0, 0, memoryview(b"x"))
    for step in (sink.finish, sink.publish, sink.abort):
        step()
    assert sink.stage == "discard"
    assert sink.result() == {"sink": "discard"}


ALL = ("a.0", "a.1", "a.2", "b.0", "b.1", "empty")


def compared_selection(sent: Path, here: Path, *include: str) -> VerifySink:
    offered = open_checkpoint(sent)
    outgoing = outgoing_files(offered, include=include)
    files = [file.spec for file in outgoing]
    sink = VerifySink(local_copy(here, files), files, selection=True)
    sink.prepare()
    for index, file in enumerate(outgoing):
        data = b""
        for segment in file.segments:
            if isinstance(segment, SourceRun):
                source = offered.files[segment.source].path.read_bytes()
                data += source[segment.offset : segment.offset + segment.nbytes]
            else:
                data += segment.data
        for offset in range(0, len(data), 1 << 20):
            put(sink, index, offset, memoryview(bytearray(data[offset : offset + (1 << 20)])))
    sink.finish()
    return sink


def test_a_selection_is_compared_with_the_same_tensors_of_a_full_copy(
    sent: Path, here: Path
) -> None:
    weights = dict.fromkeys(("a.0", "a.1", "a.2"), ONE) | dict.fromkeys(
        ("b.0", "b.1", "empty"), TWO
    )
    for folder in (sent, here):
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weights}))
    assert compared_selection(sent, here, "*.0", "a.1", "empty").sentence() is None
    damage(here / ONE, begin_of(sent, ONE, "a.2") + 3, 3)  # not chosen, and its header
    save_file({f"b.{i}": np.zeros(3) for i in range(2)}, here / TWO)
    first = here / ONE
    first.write_bytes((sent / ONE).read_bytes())
    damage(first, begin_of(sent, ONE, "a.1") + 7)
    sink = compared_selection(sent, here, "*.0", "a.1")
    found = sink.comparison()
    wrong = {file.name: file.tensors_marked("*") for file in found.marked("*")}
    assert wrong == {ONE: ["a.1"], TWO: ["b.0"]}
    assert sink.sentence() is not None
    assert "(tensor a.1, its byte 7)" in str(sink.sentence())


def test_what_is_not_chosen_may_differ(sent: Path, here: Path) -> None:
    damage(here / ONE, begin_of(sent, ONE, "a.2") + 3)
    assert compared_selection(sent, here, "*.0", "a.1").sentence() is None
