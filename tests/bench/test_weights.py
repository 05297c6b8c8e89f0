"""Generated weights: their shapes at every size, and files that safetensors reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from packcast.bench.model import ShapeKind
from packcast.bench.weights import Weight, check_space, in_shards, make_layout, write_weights
from packcast.checkpoint.checkpoint import open_checkpoint
from packcast.errors import DestinationError
from packcast.units import GIB, KIB, MIB

KINDS: tuple[ShapeKind, ...] = ("dense", "moe", "tiny")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbytes", [4 * MIB, 256 * MIB, 8 * GIB])
def test_the_size_is_the_one_asked_for_and_shards_are_alike(kind: ShapeKind, nbytes: int) -> None:
    weights = make_layout(kind, nbytes)
    total = sum(weight.nbytes for weight in weights)
    wanted = min(nbytes, 40_000 * 16 * KIB) if kind == "tiny" else nbytes
    assert wanted - 3 * MIB <= total <= wanted
    assert len({weight.name for weight in weights}) == len(weights)
    shards = in_shards(weights)
    assert [weight for shard in shards for weight in shard] == list(weights)
    assert 1 <= len(shards) <= 8
    assert len(shards) > 3 or len(weights) < 10


def test_shapes_are_what_they_are_called() -> None:
    dense = make_layout("dense", 8 * GIB)
    assert ("model.layers.3.mlp.down_proj.weight", (4096, 14336)) in {
        (weight.name, weight.shape) for weight in dense
    }
    assert len(make_layout("dense", 256 * MIB)) > 100
    experts = [weight for weight in make_layout("moe", 8 * GIB) if "experts" in weight.name]
    assert {weight.nbytes for weight in experts} == {3 * MIB}
    assert len(experts) > 2000
    tiny = make_layout("tiny", 8 * GIB)
    assert {weight.nbytes for weight in tiny} == {16 * KIB}
    assert len(tiny) == 40_000


def test_written_weights_are_a_checkpoint_of_random_blocks(tmp_path: Path) -> None:
    weights = make_layout("moe", 20 * MIB)
    told: list[int] = []
    (tmp_path / "made").mkdir()
    write_weights(tmp_path / "made", weights, told.append)
    checkpoint = open_checkpoint(tmp_path / "made")
    assert not checkpoint.warnings
    assert sum(told) == sum(weight.nbytes for weight in weights)
    found: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        with safe_open(shard.path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.offset_keys()}
    assert {(name, tuple(tensor.shape)) for name, tensor in found.items()} == {
        (weight.name, weight.shape) for weight in weights
    }
    data = b"".join(file.path.read_bytes() for file in checkpoint.shards)
    blocks = [data[at : at + MIB] for at in range(0, len(data), MIB)]
    assert len(set(blocks)) == len(blocks)
    assert all(len(set(block)) > 200 for block in blocks[:-1])


def test_every_host_makes_the_same_files(tmp_path: Path) -> None:
    weights = make_layout("dense", 6 * MIB)
    for host in ("one", "other"):
        (tmp_path / host).mkdir()
        write_weights(tmp_path / host, weights, lambda _: None)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_weights_that_do_not_fit_are_refused_with_their_copies(tmp_path: Path) -> None:
    half = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize * 2 // 3
    weights = [Weight("large", (half // 2,))]
    check_space(weights, [(tmp_path, 1), (tmp_path, 0)])
    check_space(weights, [(tmp_path, 0), (tmp_path, 1)])
    with pytest.raises(DestinationError, match=r"needed, .* free"):
        check_space(weights, [(tmp_path, 1), (tmp_path, 1)])
