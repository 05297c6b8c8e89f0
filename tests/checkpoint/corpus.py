"""Headers made from the format's rules, each breaking one of them, or at the edge of one.

A case has the header, the data part, and a fragment of the sentence that refuses it. safetensors
refuses it too, but for those named in STRICTER.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.checkpoint.handmade import entry

T = entry("U8", [1], 0, 1)
U64_END = 1 << 64


class Case(NamedTuple):
    """`header` as `handmade.file_bytes` takes it; `said` is None where it must be accepted."""

    name: str
    header: Any
    data: bytes
    said: str | None


def malformed() -> list[Case]:
    """All cases that must be refused."""
    makers = (not_json, not_headers, entries, dtypes, shapes, offsets, layouts, twice, metadata)
    return [
        Case(f"{maker.__name__}: {name}", header, data, said)
        for maker in makers
        for name, header, data, said in maker()
    ]


Made = Iterator[tuple[str, Any, bytes, str]]

ONE = json.dumps(T).encode()


def member(value: bytes) -> bytes:
    return b'{"t":' + value + b"}"


def not_json() -> Made:
    for name, text in {
        "only white space": b"   ",
        "an open brace": b"{",
        "a closing brace": b"}",
        "brackets that do not match": b"{]",
        "a name without a value": b'{"t"}',
        "a name and a colon": b'{"t":}',
        "a comma at the end": b'{"t":' + ONE + b",}",
        "a comma at the beginning": b'{,"t":' + ONE + b"}",
        "two commas": b'{"t":' + ONE + b',,"u":' + ONE + b"}",
        "no comma": b'{"t":' + ONE + b'"u":' + ONE + b"}",
        "a semicolon": b'{"t":' + ONE + b';"u":' + ONE + b"}",
        "single quotes": b"{'t':" + ONE + b"}",
        "no quotes": b"{t:" + ONE + b"}",
        "a comment": b'{"t":' + ONE + b"/* */}",
        "cut short": b'{"t":{"dtype":"U8"',
        "cut in a name": b'{"t',
        "two objects": b'{"t":' + ONE + b"}{}",
        "an object and a word": b"{} x",
        "padding with zeros": b"{}\0\0",
        "padding with vertical tabs": b"{}\x0b\x0c",
        "padding with no-break spaces": b"{}\xc2\xa0",
        "zeros first": b"\0{}",
        "a leading zero": member(b'{"dtype":"U8","shape":[01],"data_offsets":[0,1]}'),
        "a leading zero of an offset": member(b'{"dtype":"U8","shape":[1],"data_offsets":[00,1]}'),
        "a plus sign": member(b'{"dtype":"U8","shape":[+1],"data_offsets":[0,1]}'),
        "hexadecimal": member(b'{"dtype":"U8","shape":[0x1],"data_offsets":[0,1]}'),
        "no digits after the point": member(b'{"dtype":"U8","shape":[1.],"data_offsets":[0,1]}'),
        "a comma in a shape": member(b'{"dtype":"U8","shape":[1,],"data_offsets":[0,1]}'),
        "an empty place in a shape": member(b'{"dtype":"U8","shape":[,1],"data_offsets":[0,1]}'),
        "True": member(b"True"),
        "a control character in a name": b'{"t\n":' + ONE + b"}",
        "an unknown escape": b'{"\\x74":' + ONE + b"}",
        "an escape cut short": b'{"\\u00":' + ONE + b"}",
        "UTF-16": '{"t":1}'.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf{}",
    }.items():
        yield name, text, b"x" if ONE in text else b"", "not valid "
    for name, text in {
        "a byte that is not UTF-8": b'{"\xff":' + ONE + b"}",
        "an overlong form": b'{"\xc0\xaf":' + ONE + b"}",
        "half of a pair in UTF-8": b'{"\xed\xa0\x80":' + ONE + b"}",
        "beyond Unicode": b'{"\xf4\x90\x80\x80":' + ONE + b"}",
        "cut in a character": b'{"\xe2\x82":' + ONE + b"}",
    }.items():
        yield name, text, b"x", "not valid UTF-8"
    for constant in (b"Infinity", b"-Infinity", b"NaN"):
        yield constant.decode(), member(constant), b"", "is not JSON"
    yield "very deep lists", member(b"[" * 100_000 + b"]" * 100_000), b"", "nested too deeply"
    yield "very deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", "nested too deeply"
    yield "lists without end", b'{"t":' + b"[" * 100_000, b"", "nested too deeply"
    yield "thousands of digits", member(b"9" * 5000), b"", "number that is too long"


def not_headers() -> Made:
    for text in (b"[]", b"null", b"1", b'"t"', b"true", b"[" + ONE + b"]"):
        yield text[:6].decode(), text, b"", "not a JSON object"


def entries() -> Made:
    yield "a list of the fields", {"t": ["U8", [1], [0, 1]]}, b"x", "not a JSON object"
    for value in (None, True, 1, 1.5, "U8", [], [T]):
        yield repr(value)[:12], {"t": value}, b"x", "its entry is not a JSON object"
    yield "empty", {"t": {}}, b"x", "unknown dtype None"
    for field, said in {
        "dtype": "unknown dtype None",
        "shape": "None",
        "data_offsets": "Non",
    }.items():
        without = {key: value for key, value in T.items() if key != field}
        yield f"no {field}", {"t": without}, b"x", said
        yield f"{field} in capitals", {"t": without | {field.upper(): T[field]}}, b"x", said
    yield "half of a pair", b'{"\\ud800":' + ONE + b"}", b"x", "not valid Unicode"
    yield "the other half", b'{"a\\udc00":' + ONE + b"}", b"x", "not valid Unicode"
    yield "not the first", {"t": T, "u": None}, b"x", "'u': its entry is not a JSON object"


def dtypes() -> Made:
    for dtype in (
        *("u8", "F8", "FP32", "bfloat16", "", "U8 ", " U8", "U8\0", "F8_E4M3FNU", "F128", "*"),
    ):
        yield repr(dtype), {"t": T | {"dtype": dtype}}, b"x", "unknown dtype"
    for junk in (None, True, 8, 1.5, [], ["U8"], {}, {"U8": 1}):
        yield repr(junk), {"t": T | {"dtype": junk}}, b"x", "unknown dtype"


NO_SIZES = (-1, 1.0, 1.5, True, False, None, "1", [1], {}, U64_END, 10**30, 1e300)


def shapes() -> Made:
    for junk in (None, True, 1, 1.5, "1", {}, {"0": 1}):
        yield repr(junk), {"t": T | {"shape": junk}}, b"x", "not a list of sizes"
    for junk in NO_SIZES:
        for shape in ([junk], [1, junk]):
            yield repr(shape), {"t": T | {"shape": shape}}, b"x", "not a list of sizes"
    raw = b'{"dtype":"U8","shape":[%s],"data_offsets":[0,%d]}'
    for text in (b"-0", b"1e0", b"1E2", b"10e-1", b"-0.0"):
        header, data = member(raw % (text, text != b"-0")), b"x" * (text != b"-0")
        yield text.decode(), header, data, "not a list of sizes"
    for name, dtype, shape in (
        ("wraps to fit", "U8", [1 << 32, 1 << 32, 1]),
        ("wraps to 0", "U8", [1 << 63, 2]),
        ("before a zero", "U8", [1 << 32, 1 << 32, 0]),
        ("of the bits", "F64", [1 << 60]),
        ("the largest", "U8", [U64_END - 1]),
        ("of many", "U8", [2] * 63 + [4]),
    ):
        yield f"overflow {name}", {"t": entry(dtype, shape, 0, 0)}, b"", "too large"
    for dtype, size in (("F4", 1), ("F4", 3), ("F6_E2M3", 1), ("F6_E3M2", 2), ("F6_E2M3", 3)):
        nbytes = -(-size * int(dtype[1]) // 8)
        header = {"t": entry(dtype, [size], 0, nbytes)}
        yield f"{size} of {dtype}", header, b"x" * nbytes, "not a whole number of bytes"
    yield "larger than the bytes", {"t": entry("U8", [2], 0, 1)}, b"x", "takes 2 bytes"
    yield "smaller than the bytes", {"t": entry("U8", [1], 0, 2)}, b"xy", "takes 1 bytes"
    yield "empty with bytes", {"t": entry("U8", [0], 0, 1)}, b"x", "takes 0 bytes"
    yield "0-dim of another size", {"t": entry("F32", [], 0, 8)}, b"x" * 8, "takes 4 bytes"
    yield "65 dimensions", {"t": entry("U8", [1] * 65, 0, 1)}, b"x", "more than 64 dimensions"


def offsets() -> Made:
    for junk in (None, True, 1, "01", {}, [], [0], [0, 1, 1], [[0, 1]], [[0], [1]]):
        yield repr(junk), {"t": T | {"data_offsets": junk}}, b"x", "not two offsets"
    for junk in NO_SIZES:
        for pair in ([junk, 1], [0, junk]):
            yield repr(pair), {"t": T | {"data_offsets": pair}}, b"x", "not two offsets"
    zero = b'{"dtype":"U8","shape":[0],"data_offsets":[%s,0]}'
    yield "-0", member(zero % b"-0"), b"", "not two offsets"
    yield "end before begin", {"t": T | {"data_offsets": [1, 0]}}, b"x", "before its begin"
    empty = entry("U8", [0], 1, 0)
    yield "end before begin of an empty one", {"t": empty}, b"x", "before its begin"


def layouts() -> Made:
    two, hole, overlap = entry("U8", [2], 0, 2), "leaves a hole", "overlaps"
    yield "hole at the beginning", {"t": entry("U8", [1], 1, 2)}, b"xy", hole
    yield "hole between", {"t": T, "u": entry("U8", [1], 2, 3)}, b"xyz", hole
    yield "hole before an empty one", {"t": T, "u": entry("U8", [0], 2, 2)}, b"xy", hole
    yield "only an empty one, late", {"t": entry("U8", [0], 1, 1)}, b"x", hole
    yield "far away", {"t": entry("U8", [1], 1 << 63, (1 << 63) + 1)}, b"x", hole
    yield "overlap", {"t": two, "u": entry("U8", [2], 1, 3)}, b"xyz", overlap
    yield "the same bytes twice", {"t": T, "u": T}, b"x", overlap
    within = {"t": entry("U8", [3], 0, 3), "u": entry("U8", [1], 1, 2)}
    yield "one within another", within, b"xyz", overlap
    yield "empty within another", {"t": two, "u": entry("U8", [0], 1, 1)}, b"xy", overlap
    yield "data too short", {"t": two}, b"x", "truncated"
    yield "no data", {"t": two}, b"", "truncated"
    yield "data too long", {"t": T}, b"xy", "belong to no tensor"
    yield "data without tensors", {}, b"x", "belong to no tensor"
    yield "data behind empty ones", {"t": entry("U8", [0], 0, 0)}, b"x", "belong to no tensor"
    yield "data of metadata only", {"__metadata__": {"a": "b"}}, b"x", "belong to no tensor"


def twice() -> Made:
    pair = b'{"%s":%b,"%s":%b}'
    empty = json.dumps(entry("U8", [0], 0, 0)).encode()
    for name, header, data in (
        ("a name", pair % (b"t", ONE, b"t", ONE), b"x"),
        ("a name, empty", pair % (b"t", empty, b"t", empty), b""),
        ("a name, once escaped", pair % (b"t", ONE, b"\\u0074", ONE), b"x"),
        (
            "a name, with other bytes",
            pair % (b"t", ONE, b"t", ONE.replace(b"[0, 1]", b"[1, 2]")),
            b"xy",
        ),
        ("dtype", member(ONE[:-1] + b',"dtype":"I8"}'), b"x"),
        ("dtype, alike", member(ONE[:-1] + b',"dtype":"U8"}'), b"x"),
        ("shape", member(b'{"shape":[2],' + ONE[1:]), b"x"),
        ("offsets", member(ONE[:-1] + b',"data_offsets":[0,1]}'), b"x"),
        ("an extra field", member(ONE[:-1] + b',"a":1,"a":1}'), b"x"),
        ("metadata", b'{"__metadata__":{},"__metadata__":{}}', b""),
        ("a key of metadata", b'{"__metadata__":{"a":"b","a":"b"}}', b""),
    ):
        yield name, header, data, "twice"


def metadata() -> Made:
    strings = "not a map of strings to strings"
    for junk in (True, 1, "a", [], ["a"], {"a": 1}, {"a": None}, {"a": []}, {"a": {"b": "c"}}, T):
        yield repr(junk)[:14], {"__metadata__": junk}, b"", strings
        yield f"{junk!r:.14} and a tensor", {"__metadata__": junk, "t": T}, b"x", strings
    yield "half of a pair", b'{"__metadata__":{"a":"\\udfff"}}', b"", "not valid Unicode"
    yield "half of a pair in a key", b'{"__metadata__":{"\\ud834":"a"}}', b"", "not valid Unicode"
    late = b'{"t":%b,"__metadata__":{"a":1}}' % ONE
    yield "behind a tensor", late, b"x", strings


# Refused here, taken by safetensors 0.8; see `fuzz` for why.
STRICTER = {
    *("twice: a name", "twice: a name, empty", "twice: a name, once escaped"),
    *("twice: an extra field", "twice: a key of metadata"),
    *("shapes: 65 dimensions", "entries: a list of the fields"),
}


def legal() -> list[Case]:
    """All cases that must be accepted."""
    return [Case(name, header, data, None) for name, header, data in _legal()]


def _legal() -> Iterator[tuple[str, Any, bytes]]:
    one, text = ONE.decode(), '{"t":' + ONE.decode() + "}"
    yield "no tensors", {}, b""
    yield "only metadata", {"__metadata__": {"a": "b"}}, b""
    yield "null metadata", {"__metadata__": None}, b""
    yield "empty metadata", {"__metadata__": {}, "t": T}, b"x"
    yield "metadata behind a tensor", {"t": T, "__metadata__": {"a": "b"}}, b"x"
    yield "metadata that looks like entries", {"__metadata__": {"t": one, "u": "]}"}, "t": T}, b"x"
    yield "an escape in metadata", {"__metadata__": {"a": 'b"\n\\'}, "t": T}, b"x"
    for name, before, after in (
        ("leading white space", " \n\t\r", ""),
        ("padding with spaces", "", "     "),
        ("padding with other white space", "", " \n\t\r"),
    ):
        yield name, before + text + after, b"x"
    two = {"t": T, "u": entry("U8", [], 1, 2)}
    yield "white space everywhere", json.dumps(two, indent=3), b"xy"
    yield "no white space", json.dumps({"t": T}, separators=(",", ":")), b"x"
    yield "fields in another order", json.dumps({"t": T}, sort_keys=True), b"x"
    yield "an extra field", {"t": T | {"extra": [{"a": 1.5}, None, -0.0]}}, b"x"
    yield "an extra field in front", {"t": {"extra": {"shape": [7]}} | T}, b"x"
    yield "an entry within an extra field", {"t": {"u": T} | T}, b"x"
    yield "an escape in a field", text.replace("shape", "\\u0073hape"), b"x"
    yield "an escape in a dtype", text.replace("U8", "\\u00558"), b"x"
    yield "0-dim", {"t": entry("F32", [], 0, 4)}, b"abcd"
    yield "64 dimensions", {"t": entry("U8", [1] * 64, 0, 1)}, b"x"
    yield "empty", {"t": entry("F32", [0, 7], 0, 0)}, b""
    yield "two empty at one place", {"t": entry("F32", [0], 0, 0), "a": entry("U8", [0], 0, 0)}, b""
    yield "empty between", {"a": T, "z": entry("U8", [0], 1, 1), "b": entry("U8", [1], 1, 2)}, b"xy"
    yield "empty first", {"a": T, "z": entry("U8", [0], 0, 0)}, b"x"
    yield "empty at the end", {"a": T, "z": entry("U8", [0], 1, 1)}, b"x"
    yield "zero before huge", {"t": entry("U8", [0, 1 << 40, 1 << 40], 0, 0)}, b""
    yield "zero before the bits", {"t": entry("F64", [1 << 63, 0], 0, 0)}, b""
    yield "zero beside the largest", {"t": entry("U8", [0, U64_END - 1], 0, 0)}, b""
    yield "unaligned", {"a": T, "b": entry("F64", [1], 1, 9)}, b"x" * 9
    yield "any order", {"b": entry("U8", [1], 1, 2), "a": T}, b"xy"
    for dtype, shape, nbytes in (
        ("F4", [2], 1),
        ("F4", [3, 2], 3),
        ("F6_E3M2", [4], 3),
        ("F6_E2M3", [2, 2, 2], 6),
        ("F8_E8M0", [3], 3),
        ("F8_E4M3FNUZ", [1], 1),
        ("C64", [2], 16),
        ("BOOL", [0], 0),
    ):
        yield f"{dtype} {shape}", {"t": entry(dtype, shape, 0, nbytes)}, b"x" * nbytes
    for name in (
        *("", " ", "a b", "../../etc/passwd", "/", "\x7f", "\u202e", "\ufeff", "\U0001f600"),
        *("e\u0301", "dtype", "data_offsets", "]}", '"', "\\", "a,b", "{}", "\n", "\x1b[2J"),
        *("__metadata", "é" * 300),
    ):
        yield f"the name {name[:20]!r}", json.dumps({name: T}, ensure_ascii=False), b"x"
        yield f"the name {name[:20]!a}, escaped", json.dumps({name: T}), b"x"
