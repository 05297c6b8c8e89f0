"""What the tests of offer, agreement and results share: members, and an offer of every field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Literal

from packcast.checkpoint.header import LENGTH_NBYTES, parse_header
from packcast.checkpoint.outgoing import FileSpec
from packcast.control.rank_info import RankInfo
from packcast.packed.plan import BLOCK, plan_chunks, plan_digest
from packcast.transfer.offer import FileOutline, Offer, Sample
from packcast.transfer.protocol import RankAssignment

Message = dict[str, object]

HOST_B = "rank 2 (host-b, pid 1002)"


def header_text(*sizes: int) -> str:
    """A header of byte tensors `t0`, `t1`, ... of these sizes."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for i, size in enumerate(sizes):
        content[f"t{i}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    return json.dumps(content)


def shard(name: str, *sizes: int, mtime_ns: int = 1) -> FileSpec:
    json_bytes = header_text(*sizes).encode()
    nbytes = LENGTH_NBYTES + len(json_bytes) + sum(sizes)
    return FileSpec(name, nbytes, mtime_ns, 0o644, 0o755, parse_header(json_bytes, nbytes, name))


def sidecar(name: str, nbytes: int, *, mode: int = 0o644, folder_mode: int = 0o755) -> FileSpec:
    return FileSpec(name, nbytes, 1_600_000_000_123_456_789, mode, folder_mode, None)


FILES = (
    sidecar("config.json", 8),
    sidecar("empty.txt", 0),
    shard("model-00001-of-00002.safetensors", 2 * BLOCK, 77, mtime_ns=5),
    shard("model-00002-of-00002.safetensors", 300),
    sidecar("nested/deeper/run.sh", BLOCK + 1, mode=0o500, folder_mode=0o700),
)


def assigned(
    rank: int, device: str = "cpu", ranks_on_host: int = 1, readers_on_host: int = 1
) -> RankAssignment:
    return RankAssignment(
        rank=rank,
        device=device,
        ranks_on_host=ranks_on_host,
        readers_on_host=readers_on_host,
    )


OFFER = Offer(
    files=FILES,
    buffer_size=2 * BLOCK,
    num_buffers=3,
    staging=7 * BLOCK,
    readers=(1, 2),
    chain=(0, 2, 1, 3),
    plan="",
    digest="xxh3_128",
    include=("t*", "a?b"),
    exclude=("*.bias",),
    samples=(Sample(2, BLOCK, BLOCK, "ab" * 16), Sample(4, BLOCK, 1, "cd" * 16)),
    world_size=4,
    backend="gloo",
    reason="no rank sees a GPU",
    loud=True,
    assignment=assigned(3, ranks_on_host=2),
)

# These stand in a message for JSON that Python does not write.
DIGITS, NESTED = "@digits@", "@nested@"
_RAW = {DIGITS: b"9" * 5000, NESTED: b"[" * 100_000 + b"]" * 100_000}
_FIELDS = tuple(FileOutline.model_fields)

# Never what an offer's field may be, but for the flags.
JUNK: dict[str, object] = {
    "null": None,
    "true": True,
    "minus one": -1,
    "fraction": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "huge": 10**30,
    "thousands of digits": DIGITS,
    "escape": "\x1b[31m",
    "long text": "x" * 1001,
    "list of lists": [[]],
    "list of null": [None],
    "object": {"a": 1},
}


def changed(offer: Offer, **changes: object) -> Offer:
    """The offer with other values."""
    return offer.model_copy(update=changes)


def planned(offer: Offer) -> Offer:
    """The offer with the digest of its own plan."""
    sizes = [spec.nbytes for spec in offer.files]
    chunks = plan_chunks(sizes, offer.buffer_size, offer.readers)
    return changed(offer, plan=plan_digest(sizes, offer.buffer_size, chunks))


def valid_offer() -> Offer:
    return planned(OFFER)


def offer_of(files: Sequence[FileSpec], readers: tuple[int, ...] = (0,)) -> Offer:
    """An offer of these files for rank 1 of two, or of as many as the readers need."""
    return planned(
        changed(
            OFFER,
            files=tuple(files),
            readers=readers,
            chain=(),
            samples=(),
            world_size=max(2, *readers),
            assignment=assigned(1),
        )
    )


def outline_of(offer: Offer) -> Message:
    """The offer's outline, in which each shard has the text of its header."""
    data = offer.to_bytes()
    line, _, headers = data.partition(b"\n")
    outline = json.loads(line)
    for file in outline["files"]:
        if file["header"] is not None:
            nbytes = file["header"]
            file["header"], headers = headers[:nbytes].decode(), headers[nbytes:]
    assert not headers
    return dict(outline)


def packed(message: object) -> bytes:
    """The offer of such an outline, whatever is in it; files may be lists of their fields."""
    outline = deepcopy(message)
    headers: list[bytes] = []
    files = outline.get("files") if isinstance(outline, dict) else None
    for at, file in enumerate(files if isinstance(files, list) else ()):
        if isinstance(file, list):
            file = {
                **dict(zip(_FIELDS, file, strict=False)),
                **dict.fromkeys(map(str, file[len(_FIELDS) :])),
            }
            files[at] = file
        if isinstance(file, dict) and isinstance(file.get("header"), str):
            headers.append(file["header"].encode("utf-8", "surrogatepass"))
            file["header"] = len(headers[-1])
    line = json.dumps(outline, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for name, raw in _RAW.items():
        line = line.replace(f'"{name}"'.encode(), raw)
    return b"".join((line, b"\n", *headers))


def member(
    rank: int,
    role: Literal["send", "recv"] = "send",
    *,
    host: str = "host-a",
    checkpoint: str | None = "/models/m",
    fingerprint: str | None = "f1",
) -> RankInfo:
    """A rank; one that ran `recv` has no checkpoint."""
    sends = role == "send"
    return RankInfo(
        role=role,
        rank=rank,
        host=host,
        boot_id=f"boot-{host}",
        pid=1000 + rank,
        checkpoint=checkpoint if sends else None,
        fingerprint=fingerprint if sends else None,
    )
