"""Claims about copies that are compared without a transfer, and about manifests of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from packcast.errors import CheckpointError, UsageError, VerificationError
from packcast.io.compare import compare_copies, compare_with_manifest, local_files
from packcast.io.digests import BlockDigests
from packcast.io.manifest import (
    hash_file,
    hash_files,
    manifest_beside,
    names_under,
    read_manifest,
    write_manifest,
)
from packcast.packed.plan import BLOCK, plan_chunks
from tests.io.sinks import damage

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def random(nbytes: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"a.0": random(9 << 20, 1), "a.1": random(1000, 2)}, folder / ONE)
    save_file({"b.0": random(77, 3), "b.1": random(0, 0), "b.2": random(5000, 4)}, folder / TWO)
    weights = {"a.0": ONE, "a.1": ONE, "b.0": TWO, "b.1": TWO, "b.2": TWO}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def marks(source: Path, copy: Path) -> dict[str, str]:
    comparison = compare_copies(local_files(source), local_files(copy))
    found: dict[str, str] = {file.name: file.mark for file in comparison.files}
    assert comparison.equal is (set(found.values()) == {"="})
    for file in comparison.files:
        found |= {name: mark for name, mark in file.tensors if mark != "="}
    return found


def differing(source: Path, copy: Path) -> dict[str, str]:
    return {name: mark for name, mark in marks(source, copy).items() if mark != "="}


def test_a_true_copy_is_the_same(source: Path, copy: Path) -> None:
    assert differing(source, copy) == {}
    assert len(marks(source, copy)) == 4


def test_every_damaged_tensor_is_named_and_no_other(source: Path, copy: Path) -> None:
    size = (copy / TWO).stat().st_size
    damage(copy / TWO, size - 1)
    damage(copy / ONE, 200, (9 << 20) + 100)
    found = differing(source, copy)
    assert found == {ONE: "*", "a.0": "*", TWO: "*", "b.2": "*"}


def test_missing_and_extra_files_are_all_named_with_their_tensors(source: Path, copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / TWO).unlink()
    (copy / "new.json").write_text("{}")
    assert differing(source, copy) == {
        "config.json": "-",
        TWO: "-",
        "b.0": "-",
        "b.1": "-",
        "b.2": "-",
        "new.json": "+",
    }


def test_a_copy_that_was_cut_off_differs_where_it_ends(source: Path, copy: Path) -> None:
    size = (copy / ONE).stat().st_size
    with (copy / ONE).open("r+b") as file:
        file.truncate(size - 10)
    comparison = compare_copies(local_files(source), local_files(copy))
    (file_found,) = comparison.marked("*")
    assert file_found.offset == size - 10
    assert file_found.reason == f"has {size - 10:,} bytes, not {size:,}"
    assert file_found.tensors_marked("*") == ["a.1"]


def test_tensors_are_found_by_name_where_the_headers_differ(source: Path, copy: Path) -> None:
    changed = random(5000, 4)
    changed[17] ^= 1
    save_file({"b.0": random(77, 3), "b.2": changed, "b.9": random(3, 3)}, copy / TWO)
    found = differing(source, copy)
    assert found == {TWO: "*", "b.1": "-", "b.2": "*", "b.9": "+"}


def test_a_header_that_differs_is_a_difference(source: Path, copy: Path) -> None:
    save_file(
        {"b.0": random(77, 3), "b.1": random(0, 0), "b.2": random(5000, 4)}, copy / TWO, {"x": "y"}
    )
    assert differing(source, copy) == {TWO: "*"}


def test_what_cannot_be_read_is_no_equal_file(source: Path, copy: Path) -> None:
    mine, theirs = local_files(source), local_files(copy)
    (copy / ONE).unlink()
    comparison = compare_copies(mine, theirs)
    assert [file.name for file in comparison.marked("!")] == [ONE]
    assert not comparison.equal


def test_two_files_of_other_names_are_compared(source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(source / ONE, tmp_path / "other.safetensors"))
    comparison = compare_copies(local_files(source / ONE), local_files(other))
    assert [file.mark for file in comparison.files] == ["="]


def test_nothing_there_is_an_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(CheckpointError):
            local_files(path)


@pytest.mark.parametrize("program", [["sha256sum", "-c"], ["xxhsum", "-c"]], ids=str)
def test_a_manifest_is_read_by_the_program_of_its_kind(
    program: list[str], source: Path, tmp_path: Path
) -> None:
    if shutil.which(program[0]) is None:
        pytest.skip(f"there is no {program[0]}")
    kind = "sha256" if program[0] == "sha256sum" else "xxh128"
    manifest = tmp_path / "lists" / f"source.{kind}"
    write_manifest(manifest, source, hash_files(source, [ONE, TWO, "config.json"], kind))  # type: ignore[arg-type]
    ended = subprocess.run([*program, manifest.name], cwd=manifest.parent, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode().count(": OK") == 3
    damage(source / TWO, -1)
    ended = subprocess.run([*program, manifest.name], cwd=manifest.parent, capture_output=True)
    assert ended.returncode == 1


def test_a_manifest_has_lines_as_xxhsum_writes_them(source: Path) -> None:
    # `xxhsum -H2 config.json` of a file that holds {}
    line = "dc7048f8f8747f561349cde127705c16  source/config.json\n"
    manifest = source.with_name("source.xxh128")
    write_manifest(manifest, source, hash_files(source, ["config.json"], "xxh128"))
    assert manifest.read_text() == line
    assert manifest_beside(source) == manifest


def test_hashes_are_of_whole_files_and_digests_as_a_transfer_has_them(tmp_path: Path) -> None:
    for nbytes in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK + 5):
        data = random(nbytes, nbytes).tobytes()
        (tmp_path / "f").write_bytes(data)
        digests = BlockDigests([nbytes])
        blocks = [data[at : at + BLOCK] for at in range(0, nbytes, BLOCK)]
        digests.record(
            plan_chunks([nbytes], 16 << 20, (0,)), b"".join(map(xxhash.xxh3_128_digest, blocks))
        )
        seen: list[int] = []
        found = hash_file(tmp_path / "f", "sha256", seen.append, blocks=True)
        assert found == (hashlib.sha256(data).hexdigest(), digests.of_files()[0])
        assert sum(seen) == nbytes


def test_a_copy_that_changed_since_it_came_gets_no_manifest(source: Path) -> None:
    _, digest = hash_file(source / "config.json", "xxh128", lambda nbytes: None, blocks=True)
    assert digest is not None
    hash_files(source, ["config.json"], "xxh128", received={"config.json": digest})
    (source / "config.json").write_text("[]")
    with pytest.raises(VerificationError, match="has changed since it was received"):
        hash_files(source, ["config.json"], "xxh128", received={"config.json": digest})


@pytest.mark.parametrize("where", ["source.xxh128", "elsewhere/m.xxh128"])
def test_a_copy_is_compared_with_a_manifest_wherever_that_was_written(
    where: str, source: Path, copy: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / where
    write_manifest(manifest, source, hash_files(source, [*local_files(source).files], "xxh128"))
    kind, hashes = read_manifest(manifest)
    assert compare_with_manifest(local_files(copy), manifest, kind, hashes).equal
    damage(copy / ONE, -1)
    (copy / "config.json").unlink()
    (copy / "new.json").write_text("{}")
    comparison = compare_with_manifest(local_files(copy), manifest, kind, hashes)
    assert {file.name: file.mark for file in comparison.files if file.mark != "="} == {
        ONE: "*",
        "config.json": "-",
        "new.json": "+",
    }


def test_a_manifest_may_not_lie_in_the_copy_itself(source: Path) -> None:
    for inside in ("x.xxh128", "deep/x.xxh128", "../source/x.xxh128"):
        with pytest.raises(UsageError, match="is inside the copy") as raised:
            write_manifest(source / inside, source, {})
        assert str(raised.value.hint).endswith("source.xxh128")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("nonsense\n", "line 1 is neither"),
        (f"{'a' * 32}  x\n{'b' * 64}  y\n", "has two kinds of hashes"),
        (f"{'a' * 16}  x\n", "line 1 is neither"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(CheckpointError, match=what):
        read_manifest(tmp_path / "m")


def test_manifests_in_the_style_of_bsd_are_read(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(f"XXH128 (a b.json) = {'A' * 32}\n# comment\n")
    assert read_manifest(tmp_path / "m") == ("xxh128", {"a b.json": "a" * 32})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    st.dictionaries(
        st.text(
            st.characters(min_codepoint=33, max_codepoint=700, exclude_characters="/\\"),
            min_size=1,
            max_size=9,
        ).filter(lambda name: name not in (".", "..") and name.isprintable()),
        st.binary(max_size=9),
        min_size=1,
        max_size=4,
    )
)
def test_every_name_survives_a_manifest(tmp_path: Path, files: Mapping[str, bytes]) -> None:
    root = tmp_path / "any"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    write_manifest(tmp_path / "m", root, hash_files(root, list(files), "xxh128"))
    _, hashes = read_manifest(tmp_path / "m")
    assert set(names_under(root, list(hashes))) == set(files)
