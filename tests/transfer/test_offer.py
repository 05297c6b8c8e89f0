"""An offer arrives as it was made; a hostile one is refused, in a sentence and at little cost."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from packcast.checkpoint import outgoing as outgoing_module
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.checkpoint.outgoing import MAX_FILES, outgoing_files
from packcast.checkpoint.sourcefile import MAX_MTIME_NS
from packcast.control.rank_info import MAX_RANK
from packcast.errors import CheckpointError, TransferError
from packcast.packed.plan import BLOCK, TURN
from packcast.transfer.offer import (
    MAX_CHUNKS,
    MAX_NBYTES,
    MAX_SAMPLES,
    MAX_TURNS,
    FileOutline,
    Offer,
    Sample,
)
from packcast.transfer.protocol import RankAssignment
from tests.transfer.offers import (
    DIGITS,
    FILES,
    JUNK,
    NESTED,
    OFFER,
    Message,
    assigned,
    changed,
    header_text,
    outline_of,
    packed,
    shard,
    sidecar,
    valid_offer,
)

OTHERS: dict[str, Any] = {  # for each field of an offer another value than `valid_offer` has
    "files": (
        replace(shard("only.safetensors", 5, 6), elsewhere=frozenset({1}), unlisted=frozenset({0})),
    ),
    "buffer_size": BLOCK,
    "num_buffers": 1,
    "staging": 0,
    "readers": (0,),
    "chain": (3, 1, 0, 2),
    "plan": "another",
    "include": (),
    "exclude": (),
    "samples": (),
    "world_size": MAX_RANK + 1,
    "backend": "nccl",
    "reason": "jede Karte ist frei: größer ✓",
    "loud": False,
    "assignment": assigned(0, "cpu", 4, 4),
}
FIELDS = ("digest", *(name for name in OTHERS if name != "assignment"))
MODES = (0o644, 0o755)  # of a file, and of its folders
ASSIGNMENT = {"rank": 3, "device": "cpu", "ranks_on_host": 2, "readers_on_host": 1}


def received(offer: Offer) -> Offer:
    return Offer.from_bytes(packed(outline_of(offer)), offer.assignment)


def refused(data: bytes, assignment: RankAssignment = OFFER.assignment) -> str:
    """The sentence with which it is refused: one that fits a terminal."""
    with pytest.raises(TransferError, match="the sender's offer is refused") as caught:
        Offer.from_bytes(data, assignment)
    sentence = caught.value.message
    assert len(sentence) < 3000
    assert sentence.isprintable()
    return sentence


def peak_of_refusing(data: bytes) -> int:
    """The memory that it takes, in bytes."""
    tracemalloc.start()
    try:
        refused(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused_with(**changes: object) -> str:
    """The same for a valid offer with some fields changed."""
    return refused(packed(outline_of(valid_offer()) | changes))


def refused_file(*entry: object) -> str:
    """The same for an offer of one file."""
    return refused_with(files=[list(entry)], samples=[])


def test_an_offer_arrives_as_it_was_made() -> None:
    offer = valid_offer()
    assert received(offer) == offer
    assert list(received(offer).chunks()) == list(offer.chunks())


def test_the_other_values_cover_every_field() -> None:
    assert set(OTHERS) == set(Offer.model_fields) - {"digest"}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_travels(name: str) -> None:
    other: dict[str, Any] = {name: OTHERS[name]}
    if name == "world_size":
        other["chain"] = ()
    if name == "backend":
        other["assignment"] = assigned(3, "cuda:7")
    if name == "files":
        other["samples"] = (Sample(0, 0, 3, "ef"),)
    offer = changed(valid_offer(), **other)
    assert offer != valid_offer()
    assert received(offer) == offer


def test_what_is_derived_follows_from_the_fields() -> None:
    offer = received(valid_offer())
    assert offer.nbytes == sum(spec.nbytes for spec in offer.files)
    assert offer.num_tensors == 3
    assert (offer.rank, offer.device) == (3, "cpu")


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_refused(name: str) -> None:
    outline = outline_of(valid_offer())
    del outline[name]
    assert name in refused(packed(outline))


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_a_wrong_type_or_size_is_refused(name: str) -> None:
    for junk in JUNK:
        if (name, junk) != ("loud", "true"):
            refused_with(**{name: JUNK[junk]})


@pytest.mark.parametrize("name", ASSIGNMENT)
def test_an_assignment_of_a_wrong_type_or_size_is_no_message(name: str) -> None:
    RankAssignment.model_validate(ASSIGNMENT)
    for junk in JUNK.values():
        with pytest.raises(ValidationError, match=name):
            RankAssignment.model_validate(ASSIGNMENT | {name: junk})


@pytest.mark.parametrize("name", FileOutline.model_fields)
def test_a_file_of_wrong_types_is_refused(name: str) -> None:
    fields = dict(zip(FileOutline.model_fields, ["a", 1, 1, *MODES, None, [], []], strict=True))
    for junk in JUNK:
        # A header may be absent, and a time just before 1970.
        if (name, junk) in {("header", "null"), ("mtime_ns", "minus one")}:
            continue
        sentence = refused_with(files=[fields | {name: JUNK[junk]}], samples=[])
        # What is no number at all is refused earlier; a text for the header is taken for one.
        assert f"files.0.{name}" in sentence or JUNK[junk] == DIGITS or name == "header"


@pytest.mark.parametrize("mode", [-1, 0o1000, 0o4755, 0o2755, 0o1777, 0o100644])
def test_a_mode_of_more_than_permission_bits_is_refused(mode: int) -> None:
    assert "mode" in refused_file("a", 1, 1, mode, 0o755, None, [], [])
    assert "folder_mode" in refused_file("a", 1, 1, 0o644, mode, None, [], [])


def test_lists_nested_past_reason_are_refused_like_any_junk() -> None:
    for name in FIELDS:
        refused_with(**{name: NESTED})


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "\ud800", "x" * 256])
def test_a_name_that_breaks_the_rules_is_refused(name: str) -> None:
    """The rules themselves are in tests/checkpoint/test_names.py."""
    refused_file(name, 1, 1, *MODES, None, [], [])


@pytest.mark.parametrize(("one", "other"), [("a", "a"), ("straße", "STRASSE"), ("A/b", "a")])
def test_two_names_for_one_place_are_refused(one: str, other: str) -> None:
    entries = [[name, 1, 1, *MODES, None, [], []] for name in (one, "between", other)]
    assert "cannot both be there" in refused_with(files=entries, samples=[])


@pytest.mark.parametrize("positions", [None, "01", [2], [-1], [True], ["0"], [0, 1, 0]])
@pytest.mark.parametrize("field", [6, 7])
def test_positions_are_those_of_tensors(field: int, positions: object) -> None:
    entry: list[object] = ["a.safetensors", len(header_text(1, 1)) + 10, 1, *MODES]
    entry += [header_text(1, 1), [0], [1]]
    outline = outline_of(valid_offer()) | {"files": [entry], "samples": []}
    assert Offer.from_bytes(packed(outline), OFFER.assignment).files[0].elsewhere == {0}
    entry[field] = positions
    refused(packed(outline))


@pytest.mark.parametrize("parts", ["x", "/", "x/", "\x1b"])
def test_an_absurdly_long_name_costs_no_more_than_itself(parts: str) -> None:
    name = parts * ((8 << 20) // len(parts))
    files = [[name, 1, 1, *MODES, None, [], []]]
    data = packed(outline_of(valid_offer()) | {"files": files, "samples": []})
    assert peak_of_refusing(data) < 3 * len(data)


@pytest.mark.parametrize("nbytes", [0, 7, len(header_text(100)) + 107, len(header_text(100)) + 109])
def test_a_header_that_does_not_fit_its_file_is_refused(nbytes: int) -> None:
    """Malformed headers are in tests/checkpoint/test_corpus.py."""
    refused_file("m.safetensors", nbytes, 1, *MODES, header_text(100), [], [])


@pytest.mark.parametrize(
    "sample",
    [
        [5, 0, 1, "ab"],  # there are five files
        [-1, 0, 1, "ab"],
        [0, 9, 0, "ab"],  # of 8 bytes
        [0, 8, 1, "ab"],
        [0, 0, 9, "ab"],
        [1, 0, 1, "ab"],  # an empty file
        [2, 0, BLOCK + 1, "ab"],  # more than a block
        [2, 10**30, 1, "ab"],
        [0, 0, 1, "x" * 1001],
        [0, 0, 1, 7],
        [0, 0, 1],
        [0, 0, 1, "ab", 1],
    ],
)
def test_a_sample_past_the_end_or_of_no_file_is_refused(sample: list[object]) -> None:
    refused_with(samples=[sample])


@pytest.mark.parametrize(
    "readers", [[], [4], [-1], [0, 0], [0, 1, 2, 3, 0], [True], ["0"], [0.0], [None]]
)
def test_readers_that_are_no_list_of_ranks_are_refused(readers: list[object]) -> None:
    refused_with(readers=readers)


@pytest.mark.parametrize("chain", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, 3, 3], [True]])
def test_a_chain_without_every_rank_once_is_refused(chain: list[object]) -> None:
    refused_with(chain=chain)


@pytest.mark.parametrize("world_size", [0, -1, MAX_RANK + 2, 2])
def test_a_group_without_its_readers_or_addressee_is_refused(world_size: int) -> None:
    refused_with(world_size=world_size)


@pytest.mark.parametrize(
    "assignment",
    [assigned(4), assigned(3, ranks_on_host=5), assigned(3, readers_on_host=5)],
    ids=str,
)
def test_an_assignment_outside_the_group_is_refused(assignment: RankAssignment) -> None:
    refused(packed(outline_of(valid_offer())), assignment)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK + 1, (16 << 30) + BLOCK, MAX_NBYTES])
def test_a_buffer_that_cannot_be_is_refused(size: int) -> None:
    refused_with(buffer_size=size)


@pytest.mark.parametrize("count", [0, 1025, MAX_CHUNKS])
def test_a_number_of_buffers_that_cannot_be_is_refused(count: int) -> None:
    refused_with(num_buffers=count)


@pytest.mark.parametrize(
    ("backend", "device"), [("gloo", "cuda:0"), ("nccl", "cpu"), ("mpi", "cpu")]
)
def test_a_device_that_is_none_for_the_backend_is_refused(backend: str, device: str) -> None:
    outline = outline_of(valid_offer()) | {"backend": backend}
    refused(packed(outline), assigned(3, device))


@pytest.mark.parametrize(
    "device",
    [
        "",
        "meta",
        "cpu:0",
        "cpu ",
        "cuda",
        "cuda:",
        "cuda:-1",
        "cuda:0\n",
        "cuda:1000",
        "cuda:00",  # these are no device for torch either, or another one
        "cuda:\u0663",
        "cuda:255",
    ],
)
def test_a_device_that_torch_would_not_know_is_no_assignment(device: str) -> None:
    with pytest.raises(ValidationError, match="device"):
        assigned(3, device)


def too_large() -> Iterator[Message]:
    """Offers that are only too much."""
    yield {"files": [["a", MAX_NBYTES, 1, *MODES, None, [], []]], "buffer_size": BLOCK}
    yield {
        "files": [["a", (MAX_CHUNKS + 1) * BLOCK, 1, *MODES, None, [], []]],
        "buffer_size": BLOCK,
    }
    half = MAX_NBYTES // 2 + 1
    yield {
        "files": [[name, half, 1, *MODES, None, [], []] for name in "ab"],
        "buffer_size": 16 << 30,
    }
    yield {"files": [["a", MAX_NBYTES + 1, 1, *MODES, None, [], []]], "buffer_size": 16 << 30}
    yield {
        "files": [["a", (MAX_TURNS + 1) * TURN, 1, *MODES, None, [], []]],
        "buffer_size": 16 << 30,
    }
    yield {"files": [["a", 1, MAX_MTIME_NS + 1, *MODES, None, [], []]]}
    yield {"files": [["a", 1, 1, *MODES, None, [], []]] * (MAX_FILES + 1)}
    yield {"samples": [[0, 0, 1, "ab"]] * (MAX_SAMPLES + 1)}
    yield {"staging": MAX_NBYTES + 1}


@pytest.mark.parametrize("changes", list(too_large()), ids=lambda changes: "+".join(changes))
def test_too_much_is_refused_before_memory_is_taken(changes: Message) -> None:
    data = packed(outline_of(valid_offer()) | {"samples": []} | changes)
    assert peak_of_refusing(data) < (1 << 20) + 20 * len(data)


def test_another_plan_than_ones_own_is_refused_before_it_is_used() -> None:
    offer = received(changed(valid_offer(), plan="0" * 32))
    with pytest.raises(TransferError, match="plan is not the one"):
        offer.chunks()


@pytest.mark.parametrize(
    "changes",
    [{"buffer_size": BLOCK}, {"readers": (2, 1)}, {"readers": (1,)}, {"files": (sidecar("a", 1),)}],
    ids=str,
)
def test_every_number_of_the_plan_is_under_its_digest(changes: dict[str, Any]) -> None:
    offer = changed(valid_offer(), samples=(), **changes)
    with pytest.raises(TransferError, match="plan is not the one"):
        received(offer).chunks()


def test_the_files_of_an_offer_take_no_more_than_was_checked(tmp_path: Path) -> None:
    text = header_text(3, 4).replace("pt", "\U0001f600\\\\ \\n\\u00e9") + " \n\t\r" * 50
    path = tmp_path / "we'ird\u00e9.safetensors"
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + bytes(7))
    files = [file.spec for file in outgoing_files(open_checkpoint(tmp_path))]
    files = [replace(files[0], unlisted=frozenset({0, 1})), *FILES]
    offer = changed(valid_offer(), files=tuple(files), samples=())
    lines = [
        some.to_bytes().partition(b"\n")[0] for some in (offer, changed(valid_offer(), files=()))
    ]
    taken = len(lines[0]) - len(lines[1])
    assert taken <= sum(map(outgoing_module._outlined_nbytes, files))
    assert Offer.from_bytes(offer.to_bytes(), offer.assignment) == offer


@pytest.mark.parametrize("bound", ["MAX_OUTLINE_NBYTES", "MAX_FILES"])
def test_more_than_an_offer_can_hold_is_an_error_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(
            struct.pack("<Q", len(header_text(3))) + header_text(3).encode() + bytes(3)
        )
    assert outgoing_files(open_checkpoint(tmp_path))
    monkeypatch.setattr(outgoing_module, bound, 1)
    with pytest.raises(CheckpointError, match="more than 1"):
        outgoing_files(open_checkpoint(tmp_path))


BOMBS = {
    "lists": b'{"files":[' + b"[]," * 2_000_000 + b"[]]}\n",
    "objects": b'{"files":[' + b"{}," * 2_000_000 + b"{}]}\n",
    "numbers": b'{"files":[' + b"0," * 4_000_000 + b"0]}\n",
    "no end": b"[]," * 20_000_000,
    "one text": b'{"plan":"' + b"x" * 8_000_000 + b'"}\n',
    "depth": b"[" * 8_000_000 + b"\n",
    "digits": b'{"staging":' + b"9" * 8_000_000 + b"}\n",
    "names": b'{"files":[{"name":"' + b"a/" * 4_000_000 + b'"}]}\n',
    "nothing": b"",
    "a line": b"\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_is_parsed(bomb: str) -> None:
    assert peak_of_refusing(BOMBS[bomb]) < 80 << 20


@pytest.mark.parametrize("change", [b"x", b" ", b"{}"])
def test_what_follows_the_headers_is_refused(change: bytes) -> None:
    offer = valid_offer()
    data = offer.to_bytes()
    for spoilt in (data + change, data[: -len(change)]):
        with pytest.raises(TransferError, match="headers are not those"):
            Offer.from_bytes(spoilt, offer.assignment)
