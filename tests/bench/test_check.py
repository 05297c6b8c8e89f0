"""Sums and digests tell every accident from what was sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packcast.bench.check import (
    digests_of_copy,
    digests_of_files,
    sums_of,
    wrong_blocks,
    wrong_tensors,
)
from packcast.checkpoint.outgoing import FileSpec
from packcast.units import MIB

SIZES = (0, 1, 3, 4, 5, 4096, 4096, 4096, MIB - 4, MIB, MIB + 1, 3 * MIB + 7)


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def test_a_sum_does_not_depend_on_its_neighbours() -> None:
    tensors = [random_bytes(nbytes, seed) for seed, nbytes in enumerate(SIZES)]
    alone = [value for tensor in tensors for value in sums_of([tensor])]
    assert sums_of(tensors) == alone
    assert sums_of(iter(tensor.clone() for tensor in tensors)) == alone


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SIZES[1:]), st.data())
def test_any_flipped_bit_changes_the_sum(nbytes: int, data: st.DataObject) -> None:
    tensor = random_bytes(nbytes, 1)
    damaged = tensor.clone()
    at = data.draw(st.integers(0, nbytes - 1))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    assert sums_of([damaged]) != sums_of([tensor])


@pytest.mark.parametrize("unit", [4, 4096, MIB])
def test_swapped_places_and_two_flipped_signs_change_the_sum(unit: int) -> None:
    tensor = random_bytes(3 * MIB, 2)
    swapped = torch.cat([tensor[unit : 2 * unit], tensor[:unit], tensor[2 * unit :]])
    flipped = tensor.clone()
    flipped[3] ^= 0x80
    flipped[unit + 3] ^= 0x80
    assert len({*sums_of([tensor]), *sums_of([swapped]), *sums_of([flipped])}) == 3


def test_the_bytes_count_and_not_the_dtype_or_the_place_in_memory() -> None:
    data = random_bytes(4097, 3)
    whole = data[:4096]
    assert sums_of([whole]) == sums_of([whole.view(torch.bfloat16).view(32, 64)])
    assert sums_of([data[1:]]) == sums_of([data[1:].clone()])
    assert sums_of([whole.view(64, 64).T]) == sums_of([whole.view(64, 64).T.contiguous()])


def test_wrong_and_missing_tensors_are_counted() -> None:
    assert wrong_tensors([1, 2, 3], [1, 2, 3]) == 0
    assert wrong_tensors([1, 0, 0], [1, 2, 3]) == 2
    assert wrong_tensors([1], [1, 2, 3]) == 2


def test_each_wrong_block_of_a_copy_is_counted(tmp_path: Path) -> None:
    contents = {"a": random_bytes(3 * MIB + 5, 4), "sub/b": random_bytes(9 * MIB, 5)}
    specs = [FileSpec(name, data.numel(), 0, 0o644, 0o755, None) for name, data in contents.items()]

    def read(file: int, offset: int, into: memoryview) -> None:
        data = bytes(contents[specs[file].name][offset : offset + len(into)].tolist())
        into[:] = data

    truth = digests_of_files(specs, read)
    (tmp_path / "sub").mkdir()
    for name, data in contents.items():
        (tmp_path / name).write_bytes(bytes(data.tolist()))
    assert wrong_blocks(digests_of_copy(tmp_path, specs), truth) == 0

    with (tmp_path / "a").open("r+b") as file:
        file.seek(3 * MIB + 4)
        file.write(bytes([contents["a"][-1].item() ^ 1]))
    with (tmp_path / "sub/b").open("r+b") as file:
        file.truncate(7 * MIB)
    assert wrong_blocks(digests_of_copy(tmp_path, specs), truth) == 1 + 2
    (tmp_path / "a").unlink()
    assert wrong_blocks(digests_of_copy(tmp_path, specs), truth) == 4 + 2
