"""The corpora, at both ends: as files that are opened to be sent, and as headers of an offer."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors

from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.header import MAX_HEADER_NBYTES
from packcast.errors import CheckpointError, PackcastError, TransferError, UsageError
from packcast.transfer.offer import Offer
from tests.checkpoint import corpus, fuzz
from tests.checkpoint.corpus import Case
from tests.checkpoint.handmade import file_bytes, index, shard, write
from tests.transfer.offers import OFFER, outline_of, packed, valid_offer

MALFORMED, LEGAL = corpus.malformed(), corpus.legal()
NAME, PART = "model.safetensors", "model-00001-of-00001.safetensors"


def offered(case: Case) -> bytes:
    """An offer whose only file has this header."""
    whole = file_bytes(case.header, case.data)
    header = whole[8 : len(whole) - len(case.data)]
    outline = outline_of(valid_offer())
    outline |= {"samples": [], "files": [[NAME, len(whole), 1, 0o644, 0o755, None, [], []]]}
    data = packed(outline).replace(b'"header": null', b'"header": %d' % len(header))
    return data + header


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


def test_the_corpora_are_large_and_without_repetition() -> None:
    assert len(MALFORMED) + len(FILES) + len(FOLDERS) >= 250
    assert len(LEGAL) >= 70
    for cases in (MALFORMED, LEGAL):
        assert len(set(names(cases))) == len(cases)
    assert set(names(MALFORMED)) >= corpus.STRICTER


@pytest.mark.parametrize("case", MALFORMED, ids=names(MALFORMED))
def test_a_malformed_header_is_refused_at_the_sender(case: Case, tmp_path: Path) -> None:
    write(tmp_path / NAME, file_bytes(case.header, case.data))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.message.startswith(f"{NAME}: ")
    assert case.said
    assert case.said in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("case", MALFORMED, ids=names(MALFORMED))
def test_a_malformed_header_is_refused_at_a_worker(case: Case) -> None:
    data = offered(case)
    tracemalloc.start()
    try:
        with pytest.raises(TransferError, match="the sender's offer is refused") as caught:
            Offer.from_bytes(data, OFFER.assignment)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert case.said
    assert case.said in caught.value.message
    assert caught.value.message.isprintable()
    assert peak < (2 << 20) + 20 * len(data)


@pytest.mark.parametrize("case", MALFORMED, ids=names(MALFORMED))
def test_safetensors_refuses_it_too_or_it_is_written_down(case: Case) -> None:
    whole = file_bytes(case.header, case.data)
    if case.name in corpus.STRICTER:
        safetensors.deserialize(whole)
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(whole)


@pytest.mark.parametrize("case", LEGAL, ids=names(LEGAL))
def test_a_legal_header_is_accepted_at_both_ends_as_safetensors_reads_it(
    case: Case, tmp_path: Path
) -> None:
    whole = file_bytes(case.header, case.data)
    write(tmp_path / NAME, whole)
    (file,) = open_checkpoint(tmp_path).files
    data = offered(case)
    (spec,) = Offer.from_bytes(data, OFFER.assignment).files
    assert file.header == spec.header
    assert file.header
    theirs = {
        name: (found["dtype"], found["shape"], bytes(found["data"]))
        for name, found in safetensors.deserialize(whole)
    }
    assert theirs == {
        tensor.name: (tensor.dtype, list(tensor.shape), whole[tensor.begin : tensor.end])
        for tensor in file.header.tensors
    }


@pytest.mark.parametrize("seed", range(4))
def test_headers_changed_at_random_are_read_as_safetensors_reads_them(seed: int) -> None:
    outcomes = fuzz.run(5_000, seed)
    assert outcomes["refused by both"] > 1000
    assert outcomes["accepted by both, as usual"] > 100
    assert outcomes["accepted by both, as any JSON"] > 100


def length(nbytes: int) -> bytes:
    return struct.pack("<Q", nbytes)


WHOLE = file_bytes({"t": corpus.T}, b"x")
FILES = {
    "empty": (b"", "it is empty"),
    **{f"of {n} bytes": (WHOLE[:n], f"only {n} bytes") for n in range(1, 8)},
    "of 8 bytes": (WHOLE[:8], "truncated"),
    "cut in the header": (WHOLE[:30], "truncated"),
    "cut in the data": (WHOLE[:-1], "truncated"),
    "with a byte more": (WHOLE + b"!", "belong to no tensor"),
    "with a length of 0": (length(0) + b"{}", "begins with zeros"),
    "of zeros": (bytes(1000), "begins with zeros"),
    "with a length of one too much": (length(3) + b"{}", "truncated"),
    "with a length in the other order": (struct.pack(">Q", 2) + b"{}", "no header length"),
    "with a length at the bound": (length(MAX_HEADER_NBYTES) + b"{}", "truncated"),
    "with a length beyond the bound": (length(MAX_HEADER_NBYTES + 1) + b"{}", "no header length"),
    "with a length of 2**63": (length(1 << 63) + b"{}", "no header length"),
    "with the largest length": (b"\xff" * 8 + b"{}", "no header length"),
    "with a length that is short by one": (length(1) + b"{}", "not valid JSON"),
    "of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    "of HTML": (b"\n <!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "of XML": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
    "of torch": (b"PK\x03\x04\0\0\x08\x08" + bytes(60), "pickle"),
    "of pickle": (b"\x80\x02}q\x00." + bytes(60), "pickle"),
    "of GGUF": (b"GGUF\x03\0\0\0" + bytes(60), "GGUF"),
    "of JSON": (b'{"error": "not found, or private"}', "JSON text"),
    "of text": (b"this is not a checkpoint at all", "no header length"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    data, said = FILES[name]
    write(tmp_path / NAME, data)
    for path in (tmp_path, tmp_path / NAME):
        with pytest.raises(CheckpointError, match=NAME) as caught:
            open_checkpoint(path)
        assert said in caught.value.message
        assert caught.value.hint or "not a safetensors file" not in caught.value.message


def indexed(content: object) -> Callable[[Path], object]:
    """A folder with a good shard and this index."""

    def make(folder: Path) -> None:
        shard(folder / PART, "t")
        path = folder / f"{NAME}.index.json"
        if isinstance(content, bytes):
            write(path, content)
        else:
            index(path, content)  # type: ignore[arg-type]

    return make


def named(name: str) -> Callable[[Path], object]:
    return lambda folder: shard(folder / name, "t")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "without anything": (lambda folder: None, "no .safetensors file"),
    "with other weights": (lambda folder: write(folder / "model.bin"), "no .safetensors file"),
    "with a shard that is a folder": (lambda folder: (folder / NAME).mkdir(), "no .safetensors"),
    "with a link to a device": (
        lambda folder: (folder / NAME).symlink_to("/dev/zero"),
        "outside of the checkpoint",
    ),
    "with a link out": (lambda folder: (folder / NAME).symlink_to("/etc/passwd"), "outside of"),
    **{
        f"with the shard {name!r}": (named(name), said)
        for name, said in {
            "-x.safetensors": "begins with '-'",
            "a\nb.safetensors": "cannot be printed",
            "a\\b.safetensors": "backslash",
            "e\u0301.safetensors": "composed form",
            "CON.safetensors": "is a device",
            "a:b.safetensors": "has the character ':'",
            "a/b/c/d/e/f/g/h/i.safetensors": "levels deep",
            "x /a.safetensors": "ends in ' '",
        }.items()
    },
    "with an empty index": (indexed(b""), "not valid JSON"),
    "with an index that is a list": (indexed(b"[]"), "no weight_map"),
    "with an index without a map": (indexed(b'{"metadata":{}}'), "no weight_map"),
    "with an index whose map is a list": (indexed(b'{"weight_map":[]}'), "no weight_map"),
    "with an index that is cut": (indexed(b'{"weight_map":{"t":'), "not valid JSON"),
    "with an index of git-lfs": (indexed(b"version https://git-lfs.github.com/x"), "git-lfs"),
    "with an index that is not UTF-8": (indexed(b'{"\xff":1}'), "not valid UTF-8"),
    "with an index that names twice": (
        indexed(b'{"weight_map":{"t":"a","t":"a"}}'),
        "names 't' twice",
    ),
    "with an index of commas": (
        indexed(b'{"weight_map":[' + b"0," * 1_300_000 + b"0]}"),
        "larger than 400,000 tensors need",
    ),
    **{
        f"with an index that names {target!r}": (indexed({"t": target}), said)
        for target, said in {
            "absent.safetensors": "not there",
            "../model.safetensors": "has a part '..'",
            "/etc/passwd": "not relative",
            "model.bin": "not a .safetensors file",
            "": "is empty",
            "a\0b.safetensors": "cannot be printed",
        }.items()
    },
    "with an index that names a number": (indexed({"t": 1}), "not a name"),
    "with an index that names a list": (indexed({"t": [PART]}), "not a name"),
    "with an index that names half a pair": (
        indexed({"t": "\ud800.safetensors"}),
        "not valid UTF-8",
    ),
    "with an index that is nested": (indexed(b"[" * 100_000), "nested too deeply"),
    "with an index that names a tensor too many": (
        indexed({"t": PART, "absent": PART}),
        "'absent' is not in",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    make, said = FOLDERS[name]
    make(tmp_path)
    with pytest.raises(PackcastError) as caught:
        open_checkpoint(tmp_path)
    assert isinstance(caught.value, CheckpointError | UsageError)
    assert said in caught.value.message
    if name.startswith("with an index"):
        assert caught.value.message.startswith(f"{NAME}.index.json: ")


def test_an_offer_made_by_hand_is_the_one_that_travels() -> None:
    case = Case("", {"t": corpus.T}, b"x", None)
    data = offered(case)
    assert Offer.from_bytes(data, OFFER.assignment).files[0].nbytes == len(WHOLE)
