"""The index of a sharded checkpoint (`model.safetensors.index.json` and kin), read and rewritten.

Knows one index at a time; whether it fits the shards is for `checkpoint` to say.
"""

from __future__ import annotations

import json
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.header_limits import MAX_STRICT_MARKS, MAX_TENSORS
from packcast.checkpoint.names import name_fault
from packcast.checkpoint.reading import open_regular, read_exactly, shown, strict_json, what_it_is
from packcast.errors import CheckpointError

SHARD_SUFFIX = ".safetensors"
MAX_INDEX_NBYTES = 32 << 20  # 207,000 tensors have one of 21 MB
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# `model.safetensors.index.json`, `model.fp16.safetensors.index.json` and, as older libraries put
# the variant, `model.safetensors.index.fp16.json`.
_INDEX_NAME = re.compile(r".+\.safetensors\.index(\.[^./]+)?\.json")


@dataclass(frozen=True, slots=True)
class Index:
    """`shard_of` maps a tensor's name to its shard's logical name; `content` is the whole JSON.

    An index that `is_replaced` is not sent: a file with all tensors replaces its shards.
    """

    name: str
    content: dict[str, object]
    shard_of: dict[str, str]
    warnings: tuple[str, ...] = ()
    is_replaced: bool = False


def is_index(name: str) -> bool:
    """Whether a file of this logical name is an index."""
    return _INDEX_NAME.fullmatch(posixpath.basename(name)) is not None


def whole_file_of(name: str) -> str:
    """The name of the file with all tensors that may be beside this index."""
    folder, base = posixpath.split(name)
    stem, _, variant = base.removesuffix(".json").rpartition(f"{SHARD_SUFFIX}.index")
    return posixpath.join(folder, stem + variant + SHARD_SUFFIX)


def read_index(path: Path, name: str) -> Index:
    """Reads the index at `path`, whose logical name is `name`. Raises CheckpointError."""
    with open_regular(path, name) as (fd, nbytes):
        if nbytes > MAX_INDEX_NBYTES:
            raise CheckpointError(f"{name}: index of more than {MAX_INDEX_NBYTES} bytes")
        data = read_exactly(fd, nbytes, 0, name)
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > MAX_STRICT_MARKS:
        raise CheckpointError(f"{name}: index larger than {MAX_TENSORS:,} tensors need")
    warnings = []
    if data.startswith(_BYTE_ORDER_MARK):
        data = data.removeprefix(_BYTE_ORDER_MARK)
        warnings.append(f"{name}: begins with a byte order mark, which some loaders do not read")
    known = what_it_is(data[:64])
    if known and not data.lstrip().startswith((b"{", b"[")):
        raise CheckpointError(f"{name}: not an index: {known[0]}", hint=known[1])
    content = strict_json(data, name)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(weight_map, dict):
        raise CheckpointError(f"{name}: not an index: it has no weight_map")
    folder = posixpath.dirname(name)
    checked = {shard: _shard_name(shard, folder, name) for shard in _distinct(weight_map, name)}
    odd = sorted(shard for shard in checked if posixpath.join(folder, shard) != checked[shard])
    if odd:
        warnings.append(
            f"{name}: some loaders do not find a shard that is written so: {shown(odd[0])}"
        )
    shard_of = {tensor: checked[shard] for tensor, shard in weight_map.items()}
    return Index(name, content, shard_of, tuple(warnings))


def _distinct(weight_map: dict[str, object], where: str) -> set[str]:
    shards: set[str] = set()
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{where}: tensor {shown(tensor)}: its shard is not a name")
        shards.add(shard)
    return shards


def _shard_name(shard: str, folder: str, where: str) -> str:
    """The logical name of a shard, normalised: `./model.safetensors` is a valid entry."""
    written, shard = shard, posixpath.normpath(shard) if shard else shard
    fault = name_fault(shard)
    if fault:
        raise CheckpointError(f"{where}: the shard name {shown(written)} {fault}")
    if not shard.endswith(SHARD_SUFFIX):
        raise CheckpointError(f"{where}: the shard {shown(shard)} is not a {SHARD_SUFFIX} file")
    return posixpath.join(folder, shard)


def rewritten(index: Index, kept: set[str], *, nbytes: int, num_elements: int) -> bytes:
    """The index's JSON with the `kept` tensors only and their totals."""
    weight_map = index.content["weight_map"]
    metadata = index.content.get("metadata")
    assert isinstance(weight_map, dict)
    totals: dict[str, object] = dict(metadata) if isinstance(metadata, dict) else {}
    totals["total_size"] = nbytes
    if "total_parameters" in totals:
        totals["total_parameters"] = num_elements
    content = index.content | {
        "metadata": totals,
        "weight_map": {tensor: shard for tensor, shard in weight_map.items() if tensor in kept},
    }
    return json.dumps(content, indent=2).encode() + b"\n"
