"""Safetensors files and directories made byte by byte, where safetensors will not."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.errors import CheckpointError, PackcastError, UsageError


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A file with this header; a str or bytes is taken as the JSON itself."""
    if isinstance(header, str):
        header = header.encode()
    json_bytes = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(json_bytes)) + json_bytes + data


def write(path: Path, data: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def shard(path: Path, *names: str, num_elements: int = 4) -> Path:
    """A file of small float32 tensors, each with bytes of its own, written by safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    save_file(
        {
            name: numpy.arange(num_elements, dtype=numpy.float32) + 100 * at + seed
            for at, name in enumerate(names)
        },
        path,
        metadata={"format": "pt"},
    )
    return path


def index(path: Path, weight_map: Mapping[str, str], **extra: object) -> Path:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map, **extra}
    return write(path, json.dumps(content))


def sharded(folder: Path) -> Path:
    """A small directory as Hugging Face has it: two shards, the index, sidecars."""
    shard(folder / "model-00001-of-00002.safetensors", "embed", "layers.0.w", "layers.0.b")
    shard(folder / "model-00002-of-00002.safetensors", "layers.1.w", "lm_head")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(
        folder / "model.safetensors.index.json",
        {
            "embed": first,
            "layers.0.w": first,
            "layers.0.b": first,
            "layers.1.w": second,
            "lm_head": second,
        },
    )
    write(folder / "config.json", "{}")
    write(folder / "tokenizer" / "vocab.txt", "a\nb\n")
    return folder


def names(checkpoint: Checkpoint) -> list[str]:
    return [file.name for file in checkpoint.files]


def refused(
    path: Path, *, all_files: bool = False, exclude_files: Sequence[str] = ()
) -> PackcastError:
    """The error with which the checkpoint is refused."""
    with pytest.raises((CheckpointError, UsageError)) as caught:
        open_checkpoint(path, all_files=all_files, exclude_files=exclude_files)
    return caught.value
