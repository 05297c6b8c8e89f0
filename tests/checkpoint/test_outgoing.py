from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import safetensors
from safetensors.numpy import load, load_file

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import Literal, OutgoingFile, SourceRun, outgoing_files
from packcast.errors import UsageError
from tests.checkpoint.handmade import entry, file_bytes, index, shard, sharded, write


def content(checkpoint: Checkpoint, file: OutgoingFile) -> bytes:
    pieces = []
    for segment in file.segments:
        if isinstance(segment, Literal):
            pieces.append(segment.data)
        else:
            data = checkpoint.files[segment.source].path.read_bytes()
            pieces.append(data[segment.offset : segment.offset + segment.nbytes])
            assert len(pieces[-1]) == segment.nbytes > 0
    whole = b"".join(pieces)
    assert len(whole) == file.spec.nbytes
    return whole


def contents(checkpoint: Checkpoint, **selection: list[str]) -> dict[str, bytes]:
    files = outgoing_files(checkpoint, **selection)
    return {file.spec.name: content(checkpoint, file) for file in files}


def test_without_a_selection_every_file_goes_verbatim(tmp_path: Path) -> None:
    write(sharded(tmp_path) / "run.sh", "#!").chmod(0o755)
    write(tmp_path / "empty.txt")
    checkpoint = open_checkpoint(tmp_path)
    files = outgoing_files(checkpoint)
    for at, (source, file) in enumerate(zip(checkpoint.files, files, strict=True)):
        assert (file.spec.name, file.spec.nbytes) == (source.name, source.nbytes)
        assert (file.spec.mtime_ns, file.spec.mode) == (source.mtime_ns, source.mode)
        assert file.spec.folder_mode == source.folder_mode
        assert file.spec.header is source.header
        assert file.segments == ((SourceRun(at, 0, source.nbytes),) if source.nbytes else ())


def test_a_selection_is_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    path = shard(tmp_path / "model.safetensors", "a", "b", "c", "d", "e")
    checkpoint = open_checkpoint(path)
    [data] = contents(checkpoint, include=["[abd]", "e"], exclude=["e"]).values()
    [file] = outgoing_files(checkpoint, include=["[abd]", "e"], exclude=["e"])
    theirs = load(data)
    ours = load_file(path)
    assert set(theirs) == {"a", "b", "d"}
    for name, array in theirs.items():
        numpy.testing.assert_array_equal(array, ours[name])
    assert file.spec.header
    assert file.spec.header.metadata == {"format": "pt"}
    assert file.spec.header.data_begin % 8 == 0
    assert [tensor.name for tensor in file.spec.header.tensors] == ["a", "b", "d"]
    assert len(file.segments) == 3  # the header, a and b in one run, d


def test_odd_tensors_survive_a_selection(tmp_path: Path) -> None:
    header = {
        "half": entry("F4", [3, 2], 0, 3),
        "gone": entry("U8", [2], 3, 5),
        "empty": entry("F32", [0, 3], 5, 5),
        "scalar": entry("F64", [], 5, 13),
        "ü/\u2028": entry("F8_E8M0", [1], 13, 14),
    }
    path = write(tmp_path / "odd.safetensors", file_bytes(header, bytes(range(14))))
    [data] = contents(open_checkpoint(path), exclude=["gone"]).values()
    found = {
        name: (t["dtype"], t["shape"], bytes(t["data"]))
        for name, t in safetensors.deserialize(data)
    }
    assert found == {
        "half": ("F4", [3, 2], bytes(range(3))),
        "empty": ("F32", [0, 3], b""),
        "scalar": ("F64", [], bytes(range(5, 13))),
        "ü/\u2028": ("F8_E8M0", [1], bytes([13])),
    }


def test_only_empty_tensors_can_be_selected(tmp_path: Path) -> None:
    header = {"empty": entry("U8", [0], 0, 0), "full": entry("U8", [1], 0, 1)}
    path = write(tmp_path / "x.safetensors", file_bytes(header, b"x"))
    [file] = outgoing_files(open_checkpoint(path), include=["empty"])
    [literal] = file.segments
    assert isinstance(literal, Literal)
    assert [name for name, _ in safetensors.deserialize(literal.data)] == ["empty"]


def test_shards_and_index_follow_the_selection(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    whole = contents(checkpoint)
    some = contents(checkpoint, include=["layers.0.*"])
    assert set(whole) - set(some) == {"model-00002-of-00002.safetensors"}
    assert some["config.json"] == whole["config.json"]
    rewritten = json.loads(some["model.safetensors.index.json"])
    assert set(rewritten["weight_map"]) == {"layers.0.w", "layers.0.b"}
    assert rewritten["metadata"] == {"total_size": 32}
    for name, data in some.items():
        write(tmp_path / "copy" / name, data)
    copy = open_checkpoint(tmp_path / "copy")
    assert (copy.num_tensors, copy.warnings) == (2, ())


def test_a_shard_that_keeps_all_its_tensors_goes_verbatim(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    whole = contents(checkpoint)
    assert contents(checkpoint, include=["*"]) == whole
    some = contents(checkpoint, exclude=["embed"])
    assert some["model-00002-of-00002.safetensors"] == whole["model-00002-of-00002.safetensors"]
    assert set(some) == set(whole)


def test_an_index_of_nothing_is_dropped_and_totals_are_made_again(tmp_path: Path) -> None:
    for folder in ("unet", "vae"):
        shard(tmp_path / folder / "m-1.safetensors", f"{folder}.a", f"{folder}.b")
        index(
            tmp_path / folder / "m.safetensors.index.json",
            {f"{folder}.a": "m-1.safetensors", f"{folder}.b": "m-1.safetensors"},
            metadata={"total_size": 99, "total_parameters": 99, "made_by": "hand"},
            more=["kept"],
        )
    some = contents(open_checkpoint(tmp_path), include=["vae.b"])
    assert set(some) == {"vae/m-1.safetensors", "vae/m.safetensors.index.json"}
    rewritten = json.loads(some["vae/m.safetensors.index.json"])
    assert rewritten == {
        "metadata": {"total_size": 16, "total_parameters": 4, "made_by": "hand"},
        "weight_map": {"vae.b": "m-1.safetensors"},
        "more": ["kept"],
    }


def test_globs_mind_the_case_and_nothing_selected_is_a_usage_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shard(tmp_path / "model.safetensors", "a"))
    for selection in ({"include": ["A"]}, {"exclude": ["*"]}, {"include": ["a"], "exclude": ["a"]}):
        with pytest.raises(UsageError, match="no tensor"):
            outgoing_files(checkpoint, **selection)
