"""Generated weights: which tensors, in which shards, and random bytes for them on disk.

The bytes follow from a seed, so every host makes the same files.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from packcast.bench.model import ShapeKind
from packcast.errors import DestinationError
from packcast.packed.layout import TensorSpec
from packcast.packed.plan import PAGE, align_up
from packcast.packed.ring import host_view
from packcast.units import KIB, MIB, format_size

NUM_SHARDS = 8
MAX_TINY_TENSORS = 40_000  # with more the baselines take minutes

_ELEMENT_NBYTES = 2  # all are bf16
_PATTERN_NBYTES = 4 * MIB
_SEED = 20_260_101
_NUM_WRITERS = 4


@dataclass(frozen=True, slots=True)
class Weight:
    """One bf16 tensor to generate."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_NBYTES

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.shape, torch.bfloat16)


def make_layout(kind: ShapeKind, nbytes: int) -> tuple[Weight, ...]:
    """Tensors of about `nbytes` together, in order; at most 40,000 of `tiny`."""
    if kind == "dense":
        return tuple(_dense(nbytes))
    if kind == "moe":
        return tuple(_until(_moe(), nbytes))
    return tuple(_until(_tiny(), min(nbytes, MAX_TINY_TENSORS * 16 * KIB)))


def in_shards(weights: Sequence[Weight]) -> list[list[Weight]]:
    """The weights split into shards of about equal size."""
    total = sum(weight.nbytes for weight in weights)
    shards: list[list[Weight]] = [[] for _ in range(min(NUM_SHARDS, len(weights)))]
    before = 0
    for weight in weights:
        shards[min(len(shards) - 1, before * len(shards) // total)].append(weight)
        before += weight.nbytes
    return [shard for shard in shards if shard]


def write_weights(
    folder: Path, weights: Sequence[Weight], written: Callable[[int], object]
) -> None:
    """Write shards and index into `folder`, an empty one; no two blocks of 1 MiB are equal.

    Durable when this returns. Threads call `written(nbytes)` as they write. Raises OSError.
    """
    shards = in_shards(weights)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    pattern = torch.frombuffer(
        bytearray(random.Random(_SEED).randbytes(_PATTERN_NBYTES)), dtype=torch.int64
    )

    def write(i: int) -> None:
        _write_shard(folder / names[i], shards[i], pattern, random.Random(_SEED + 1 + i), written)

    with ThreadPoolExecutor(_NUM_WRITERS, "packcast-weights") as pool:
        list(pool.map(write, range(len(shards))))
    weight_map = {
        weight.name: name for name, shard in zip(names, shards, strict=True) for weight in shard
    }
    total = sum(weight.nbytes for weight in weights)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(
    path: Path,
    weights: Sequence[Weight],
    pattern: torch.Tensor,
    words: random.Random,
    written: Callable[[int], object],
) -> None:
    header: dict[str, object] = {}
    at = 0
    for weight in weights:
        offsets = [at, at + weight.nbytes]
        header[weight.name] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": offsets}
        at += weight.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)  # as torch and others map files: aligned data
    piece = torch.empty_like(pattern)
    view = host_view(piece.view(torch.uint8))
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, at, _PATTERN_NBYTES):
            torch.bitwise_xor(pattern, words.getrandbits(62), out=piece)
            nbytes = min(_PATTERN_NBYTES, at - begin)
            file.write(view[:nbytes])
            written(nbytes)
        file.flush()
        os.fsync(file.fileno())


def _dense(nbytes: int) -> Iterator[Weight]:
    """Like Llama: as wide as eight layers allow, then as many layers as fit."""
    hidden = 4096
    while hidden > 32 and 336 * hidden**2 > nbytes:  # eight layers and both embeddings, in bytes
        hidden //= 2
    vocabulary, inner, key_value = 32 * hidden, hidden * 7 // 2, hidden // 4
    yield Weight("model.embed_tokens.weight", (vocabulary, hidden))
    layer = [
        ("input_layernorm", (hidden,)),
        ("self_attn.q_proj", (hidden, hidden)),
        ("self_attn.k_proj", (key_value, hidden)),
        ("self_attn.v_proj", (key_value, hidden)),
        ("self_attn.o_proj", (hidden, hidden)),
        ("post_attention_layernorm", (hidden,)),
        ("mlp.gate_proj", (inner, hidden)),
        ("mlp.up_proj", (inner, hidden)),
        ("mlp.down_proj", (hidden, inner)),
    ]
    layer_nbytes = sum(math.prod(shape) for _, shape in layer) * _ELEMENT_NBYTES
    row_nbytes = hidden * _ELEMENT_NBYTES
    rest = nbytes - vocabulary * row_nbytes - row_nbytes
    num_layers = max(1, (rest - vocabulary * row_nbytes) // layer_nbytes)
    for i in range(num_layers):
        for name, shape in layer:
            yield Weight(f"model.layers.{i}.{name}.weight", shape)
    yield Weight("model.norm.weight", (hidden,))
    # The last matrix takes the remaining bytes, so that the total is as requested.
    rows = max(1, (rest - num_layers * layer_nbytes) // row_nbytes)
    yield Weight("lm_head.weight", (rows, hidden))


def _moe() -> Iterator[Weight]:
    """Layers of a small attention and 32 experts with three matrices of 3 MiB each."""
    for i in itertools.count():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Weight(f"model.layers.{i}.self_attn.{name}.weight", (256, 2048))
        for expert in range(32):
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield Weight(f"model.layers.{i}.mlp.experts.{expert}.{name}.weight", (768, 2048))


def _tiny() -> Iterator[Weight]:
    for i in itertools.count():
        yield Weight(f"blocks.{i}.weight", (8192,))


def _until(weights: Iterator[Weight], nbytes: int) -> Iterator[Weight]:
    """As many as fit into `nbytes`, but at least one."""
    total = 0
    for weight in weights:
        if total and total + weight.nbytes > nbytes:
            return
        total += weight.nbytes
        yield weight


def check_space(weights: Sequence[Weight], copies: Sequence[tuple[Path, int]]) -> None:
    """Raise DestinationError unless each folder has room for as many copies of the weights' files.

    Folders on the same file system are added up.
    """
    headers_and_index = 300 * len(weights) + 2 * PAGE * NUM_SHARDS
    each = align_up(sum(weight.nbytes for weight in weights) + headers_and_index, MIB)
    needed: dict[int, tuple[Path, int]] = {}
    for folder, count in copies:
        device = os.stat(folder).st_dev
        first, nbytes = needed.get(device, (folder, 0))
        needed[device] = first, nbytes + count * each
    for path, nbytes in needed.values():
        room = os.statvfs(path)
        free = room.f_bavail * room.f_frsize
        if nbytes > free:
            text = f"{path}: {format_size(nbytes)} needed, {format_size(free)} free"
            raise DestinationError(text, hint="choose a smaller --size, or another --dir")
