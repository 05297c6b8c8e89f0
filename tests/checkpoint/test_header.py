from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from packcast.checkpoint import header as header_module
from packcast.checkpoint.header import parse_header, read_header
from packcast.checkpoint.header_limits import HeaderLimits
from packcast.checkpoint.tensor_table import DTYPE_BITS
from packcast.errors import CheckpointError
from tests.checkpoint.handmade import entry, file_bytes, write

NUMPY_DTYPES = {"BOOL": "?", "C64": "c8", "F16": "f2", "F32": "f4", "F64": "f8"}
NUMPY_DTYPES |= {f"{kind}{8 * n}": f"{kind.lower()}{n}" for kind in "UI" for n in (1, 2, 4, 8)}


def parse(header: object, data: bytes = b"") -> header_module.Header:
    whole = file_bytes(header, data)
    return parse_header(whole[8 : len(whole) - len(data)], len(whole), "x.safetensors")


def refused(header: object, data: bytes = b"") -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(header, data)
    assert caught.value.message.startswith("x.safetensors: ")
    assert len(caught.value.message) < 500
    return caught.value.message


def test_what_safetensors_writes_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    arrays = {
        f"{name}.{n}": numpy.zeros((n, 3), t) for name, t in NUMPY_DTYPES.items() for n in (1, 5)
    }
    arrays |= {"scalar": numpy.float32(7).reshape(()), "empty": numpy.zeros((0, 4), "f2")}
    arrays = {name: numpy.asarray(array) for name, array in arrays.items()}
    for at, array in enumerate(arrays.values()):
        array.view("u1" if array.ndim else array.dtype)[...] = at % 2
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt", "note": "ü"})
    header = read_header(path)
    data = path.read_bytes()
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert header.file_nbytes == len(data)
    assert {tensor.name for tensor in header.tensors} == set(arrays)
    for tensor in header.tensors:
        array = arrays[tensor.name]
        assert tensor.shape == array.shape
        assert tensor.nbytes == array.nbytes
        assert array.dtype == numpy.dtype(NUMPY_DTYPES[tensor.dtype])
        assert data[tensor.begin : tensor.end] == array.tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_size_that_safetensors_gives_it(dtype: str) -> None:
    nbytes = DTYPE_BITS[dtype]  # of eight elements
    whole = file_bytes({"t": entry(dtype, [8], 0, nbytes)}, bytes(nbytes))
    [(name, found)] = safetensors.deserialize(whole)
    assert (name, found["dtype"], len(found["data"])) == ("t", dtype, nbytes)
    assert parse({"t": entry(dtype, [8], 0, nbytes)}, bytes(nbytes)).tensors[0].nbytes == nbytes
    refused({"t": entry(dtype, [8], 0, nbytes - 1)}, bytes(nbytes - 1))


T = entry("U8", [1], 0, 1)


def test_messages_name_the_tensor() -> None:
    assert "tensor 'layers.7.w': unknown dtype 'Q8'" in refused(
        {"layers.7.w": entry("Q8", [1], 0, 1)}
    )
    assert "takes 8 bytes, its offsets 4" in refused({"t": entry("F32", [2], 0, 4)}, b"abcd")
    assert "'u' overlaps" in refused({"t": T, "u": T}, b"x")
    assert "'u' leaves a hole" in refused({"t": T, "u": entry("U8", [1], 2, 3)}, b"xyz")


def test_a_message_never_carries_control_characters_or_a_long_name() -> None:
    assert "\x1b" not in refused({"\x1b[2J": entry("Q8", [1], 0, 1)})
    refused({"n" * 100_000: entry("Q" * 100_000, [1] * 60, 0, 1)})
    refused({"t": entry("U8", [1 << 60] * 64, 0, 1)})
    refused({"t": T | {"shape": [{"deep": []}] * 1000}}, b"x")


def test_nesting_too_deep_for_a_parser_is_refused() -> None:
    for depth in (900, 950, 980, 990):  # near the parser's limit; the corpus has deeper ones
        refused(b'{"t":{"dtype":' + b"[" * depth + b"]" * depth + b"}}")


def test_bounds_hold_before_anything_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> object:
        raise AssertionError("parsed")

    monkeypatch.setattr(header_module, "usual", never)
    four = json.dumps({str(n): T for n in range(4)}).encode()
    with pytest.raises(CheckpointError, match="more than 400,000 tensors"):
        parse_header(four, 1000, "x", HeaderLimits(num_tensors=3))
    with pytest.raises(CheckpointError, match="more than 50,331,648 bytes of headers"):
        parse_header(four, 1000, "x", HeaderLimits(nbytes=len(four) - 1))
    monkeypatch.setattr(header_module, "usual", lambda *_: None)
    monkeypatch.setattr(header_module, "strict", never)
    for bomb in (b"[" * 101, b"0," * 101, b"{" * 101):
        with pytest.raises(CheckpointError, match="not as safetensors writes it"):
            parse_header(bomb, 1000, "x", HeaderLimits(strict_marks=100))


def test_the_bounds_are_of_all_shards_together() -> None:
    limits = HeaderLimits(num_tensors=5, num_sizes=5)
    text = json.dumps({str(n): entry("U8", [1, 0], 0, 0) for n in range(2)}).encode()
    parse_header(text, 8 + len(text), "a", limits)
    with pytest.raises(CheckpointError, match=r"b: .* more than 2,000,000 dimensions"):
        parse_header(text, 8 + len(text), "b", limits)
    three = json.dumps({str(n): entry("U8", [0], 0, 0) for n in range(4)}).encode()
    with pytest.raises(CheckpointError, match=r"c: .* more than 400,000 tensors"):
        parse_header(three, 8 + len(three), "c", limits)


def test_tensors_are_counted_however_they_are_spelt() -> None:
    text = json.dumps({str(n): entry("U8", [0], 0, 0) for n in range(4)})
    text = text.replace("data_offsets", "data\\u005foffsets")
    limits = HeaderLimits(num_tensors=3)
    with pytest.raises(CheckpointError, match="more than 400,000 tensors"):
        parse_header(text.encode(), 8 + len(text), "x", limits)


def test_tensor_at_finds_the_tensor_of_each_byte() -> None:
    header = parse(
        {
            "b": entry("U8", [2], 0, 2),
            "z-empty": entry("U8", [0], 2, 2),
            "a": entry("U8", [3], 2, 5),
            "end-empty": entry("U8", [0], 5, 5),
        },
        b"xxyyy",
    )
    at = [header.tensor_at(offset) for offset in range(header.file_nbytes + 2)]
    names = [tensor.name if tensor else None for tensor in at]
    assert names == [None] * header.data_begin + ["b"] * 2 + ["a"] * 3 + [None] * 2
    assert parse({}).tensor_at(0) is None
    assert header.tensor_at(-1) is None


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    whole = file_bytes({"t": entry("F32", [25], 0, 100)}, bytes(100))
    for nbytes in range(9, len(whole)):
        path = write(tmp_path / "model.safetensors", whole[:nbytes])
        with pytest.raises(CheckpointError, match=f"shard 7: truncated: {nbytes} bytes") as caught:
            read_header(path, "shard 7")
        if nbytes > len(whole) - 100:
            assert f"expected {len(whole)}" in caught.value.message
    write(path, whole + b"!")
    with pytest.raises(CheckpointError, match=f"{len(whole) + 1} bytes, expected {len(whole)}"):
        read_header(path)
    with pytest.raises(CheckpointError, match="truncated"):
        parse_header(b"{}", 9, "x.safetensors")


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
SIZES = st.integers(0, 9) | st.sampled_from([-1, 1 << 32, 1 << 63, 1 << 64, True, 1.0])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F4", "F6_E2M3", "F32", "F64", "Q"]) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    },
    optional={"extra": JSON},
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


def only_refuses(json_bytes: bytes, file_nbytes: int) -> None:
    try:
        header = parse_header(json_bytes, file_nbytes, "x")
    except CheckpointError:
        return
    data = bytes(file_nbytes - 8 - len(json_bytes))
    theirs = dict(safetensors.deserialize(file_bytes(json_bytes, data)))
    assert {t.name: (list(t.shape), t.dtype, t.nbytes) for t in header.tensors} == {
        name: (found["shape"], found["dtype"], len(found["data"])) for name, found in theirs.items()
    }


@given(HEADERS, st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_a_hostile_header_is_refused_or_read_as_safetensors_reads_it(
    content: dict[str, object], data_nbytes: int
) -> None:
    json_bytes = json.dumps(content).encode()
    only_refuses(json_bytes, 8 + len(json_bytes) + data_nbytes)


GOOD = json.dumps({"a": entry("F32", [2, 3], 0, 24), "b": entry("F4", [2], 24, 25)}).encode()


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=2)), max_size=3))
@settings(max_examples=150, deadline=None)
@example([])
def test_a_damaged_header_is_refused_or_read_as_safetensors_reads_it(
    edits: list[tuple[int, bytes]],
) -> None:
    damaged = GOOD
    for at, piece in edits:
        damaged = damaged[:at] + piece + damaged[at + 1 :]
    only_refuses(damaged, 8 + len(damaged) + 25)


@given(st.binary(max_size=200), st.integers(-10, 1 << 65))
@settings(max_examples=120, deadline=None)
def test_any_bytes_are_refused_or_read(json_bytes: bytes, file_nbytes: int) -> None:
    with suppress(CheckpointError):
        parse_header(json_bytes, file_nbytes, "x")


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.integers(0, 5)), max_size=8),
    st.randoms(),
)
@settings(max_examples=100, deadline=None)
def test_every_legal_layout_is_accepted(layout: list[tuple[str, int]], random: Random) -> None:
    entries, at = [], 0
    for number, (dtype, eights) in enumerate(layout):
        end = at + eights * DTYPE_BITS[dtype]
        entries.append((f"t{number}", entry(dtype, [eights, 4, 2], at, end)))
        at = end
    random.shuffle(entries)
    header = parse(dict(entries), bytes(at))
    assert len(header.tensors) == len(layout)
    assert sum(tensor.nbytes for tensor in header.tensors) == at
