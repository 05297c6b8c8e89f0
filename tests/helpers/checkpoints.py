"""Checkpoints made for tests: random bytes, never zeros, every dtype, odd sizes, odd places."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from packcast.checkpoint.tensor_table import DTYPE_BITS


def write_safetensors(
    path: Path,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    *,
    seed: int = 0,
    pad: int = 0,
    metadata: dict[str, str] | None = None,
) -> None:
    """A safetensors file by hand: name -> (dtype, shape); `pad` spaces shift every offset."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        assert bits % 8 == 0, f"{name}: not whole bytes"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    text = json.dumps(header).encode() + b" " * pad
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + random.Random(seed).randbytes(at))


def every_dtype() -> dict[str, tuple[str, tuple[int, ...]]]:
    """A tensor of each dtype, then 0-dim, empty and odd ones that unalign what follows."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"all.{dtype}": (dtype, (8, 5)) for dtype in DTYPE_BITS
    }
    tensors["scalar"] = ("F64", ())
    tensors["empty"] = ("BF16", (0, 7))
    tensors["odd"] = ("U8", (13,))
    tensors["unaligned"] = ("F32", (3, 1, 5))
    return tensors


def sharded(
    folder: Path, num_shards: int, nbytes_each: int, *, seed: int = 0, index: bool = True
) -> Path:
    """A Hugging Face style directory: shards, index, sidecars, one of them in a nested folder."""
    weight_map = {}
    for i in range(1, num_shards + 1):
        shard = f"model-{i:05d}-of-{num_shards:05d}.safetensors"
        sizes = [nbytes_each // 3 + i, nbytes_each // 5, nbytes_each // 7 * 2 + 1]
        tensors = {f"layer.{i}.{k}": ("U8", (size,)) for k, size in enumerate(sizes)}
        write_safetensors(folder / shard, tensors, seed=seed + i)
        weight_map |= dict.fromkeys(tensors, shard)
    if index:
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (folder / "empty.txt").write_text("")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling": true}')
    return folder


def same_tree(left: Path, right: Path) -> None:
    """Assert that two directories hold the same files, hidden ones aside, with the same bytes."""
    names = [
        sorted(
            str(p.relative_to(root))
            for p in root.rglob("*")
            if not p.is_dir() and not p.name.startswith(".")
        )
        for root in (left, right)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
