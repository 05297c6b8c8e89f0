"""Headers changed at random, read by packcast and by safetensors.

For N of them: `python -m tests.checkpoint.fuzz N [SEED]`.

What safetensors refuses is refused here. What both accept is read alike. And where packcast is
stricter, it is for one of these reasons (safetensors 0.8):

- a name or a key occurs twice in one object, in any object: which one counts is up to the reader;
- a tensor has more than 64 dimensions: no library could hold it;
- a tensor is a list of its fields, which is how safetensors' parser happens to take a struct.

Within fields that neither knows packcast reads any JSON, where safetensors stops at a depth of 128
and at numbers that no float holds; nothing of such a field is ever used.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from random import Random

import safetensors

from packcast.checkpoint.entries import strict, usual
from packcast.checkpoint.header import parse_header
from packcast.checkpoint.header_limits import HeaderLimits
from packcast.errors import CheckpointError
from tests.checkpoint import corpus
from tests.checkpoint.handmade import file_bytes

STRICTER = ("twice", "more than 64 dimensions", "its entry is not a JSON object")
TOKENS = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\0", b"\xff", b"\xc3\xa9"),
    *(b"0", b"1", b"2", b"9", b"-", b"-0", b".", b"e", b"00"),
    *(b"18446744073709551616", b"4294967296"),
    *(b"true", b"null", b'"t"', b'"u"', b'"shape"', b'"dtype"', b'"data_offsets"', b"\\u0074"),
    *(b'"__metadata__"', b'"U8"', b'"F4"', b'"F64"'),
    *(b"[0]", b"[0,1]", b"[1,1]", b"{}", b"[]", b"]}"),
)


def seeds() -> list[tuple[bytes, bytes]]:
    """Headers to begin with, each with its data."""
    found = []
    for case in (*corpus.legal() * 5, *corpus.malformed()):
        whole = file_bytes(case.header, case.data)
        if len(whole) < 400:
            found.append((whole[8 : len(whole) - len(case.data)], case.data))
    plain = {"t": corpus.T, "u": corpus.entry("F32", [2, 3], 1, 25)}
    for content in (plain, {"__metadata__": {"format": "pt"}} | plain):
        found += [(json.dumps(content, separators=(",", ":")).encode(), bytes(25))] * 100
    return found


def mutant(random: Random, pool: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """One of the seeds with a few changes."""
    header, data = random.choice(pool)
    text = bytearray(header)
    for _ in range(random.choice((1, 1, 1, 1, 1, 2, 3, 5))):
        at = random.randrange(len(text) + 1)
        how = random.randrange(10)
        if how == 0:
            text[at : at + 1] = random.choice(TOKENS)
        elif how == 1:
            text[at:at] = random.choice(TOKENS)
        elif how == 2:
            del text[at : at + random.choice((1, 1, 2, 8))]
        elif how == 3 and text:
            text[at % len(text)] ^= 1 << random.randrange(8)
        elif how == 4:  # a piece again, somewhere
            piece = text[at : at + random.choice((3, 10, 50))]
            to = random.randrange(len(text) + 1)
            text[to:to] = piece
        elif how == 5:  # another number
            digits = [i for i, byte in enumerate(text) if byte in b"0123456789"]
            if digits:
                text[random.choice(digits)] = random.choice(b"0123456789")
        elif how in (7, 8):  # which often changes nothing
            at = 1 + max(text.rfind(mark, 0, at) for mark in (b",", b":", b"{"))
            text[at:at] = random.choice((b" ", b" ", b"\n", b"\t ", b"\x0b"))
        elif how == 9:
            text[at:at] = text[at : at + 1].isalpha() * random.choice((b"x", b"\\n", b"\xc3\xa9"))
        else:
            data = bytes(max(0, len(data) + random.choice((-1, 0, 1, 8))))
    return bytes(text), data


def compare(header: bytes, data: bytes) -> str:
    """What both make of it; AssertionError where that is not as it should be."""
    whole = file_bytes(header, data)
    try:
        ours = parse_header(header, len(whole), "x")
    except CheckpointError as error:
        said = error.message
        assert said.isprintable(), header
        try:
            safetensors.deserialize(whole)
        except safetensors.SafetensorError:
            return "refused by both"
        reason = next((reason for reason in STRICTER if reason in said), None)
        assert reason is not None, (header, data, said)
        return f"stricter: {reason}"
    try:
        theirs = {
            name: (found["dtype"], found["shape"], bytes(found["data"]))
            for name, found in safetensors.deserialize(whole)
        }
    except safetensors.SafetensorError as error:
        if any(why in str(error) for why in ("recursion limit", "out of range")):
            return "a depth or a number in a field that neither knows"
        raise
    assert theirs == {
        tensor.name: (tensor.dtype, list(tensor.shape), whole[tensor.begin : tensor.end])
        for tensor in ours.tensors
    }, (header, data)
    found = usual(header, HeaderLimits(), "x")
    if found is None:
        return "accepted by both, as any JSON"
    assert found == strict(header, "x"), header
    return "accepted by both, as usual"


def run(count: int, seed: int) -> Counter[str]:
    """So many mutants, by outcome."""
    random, pool = Random(seed), seeds()
    return Counter(compare(*mutant(random, pool)) for _ in range(count))


if __name__ == "__main__":
    began, number = time.monotonic(), int(sys.argv[1])
    outcomes = run(number, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    for outcome, times in outcomes.most_common():
        print(f"{times:>12,}  {outcome}")
    print(f"{number:>12,}  in {time.monotonic() - began:.0f} s")
