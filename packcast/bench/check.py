"""Compares received bytes with the sender's: digests of files' blocks, weighted sums of tensors.

Runs outside the timed part, and shares no code with the checks of a transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from packcast.checkpoint.outgoing import FileSpec
from packcast.packed.plan import BLOCK, DIGEST_NBYTES, align_up
from packcast.packed.tensor_bytes import as_bytes

_NUM_THREADS = 8
_PIECE_NBYTES = 8 * BLOCK
_ROW_WORDS = 1 << 18  # of 32 bits: 1 MiB
_ROWS_AT_ONCE = {"cpu": 1, "cuda": 16}
_WORD_NBYTES = 4

ReadAt = Callable[[int, int, memoryview], object]  # file, offset, into


def digests_of_files(files: Sequence[FileSpec], read: ReadAt) -> list[bytes]:
    """For each file the digests of its 1 MiB blocks, one after the other."""

    def digests_of(piece: tuple[int, int, int]) -> bytes:
        file, offset, nbytes = piece
        view = memoryview(bytearray(nbytes))
        read(file, offset, view)
        blocks = (view[at : at + BLOCK] for at in range(0, nbytes, BLOCK))
        return b"".join(map(xxhash.xxh3_128_digest, blocks))

    pieces = [
        (file, offset, min(_PIECE_NBYTES, spec.nbytes - offset))
        for file, spec in enumerate(files)
        for offset in range(0, spec.nbytes, _PIECE_NBYTES)
    ]
    tables = [b""] * len(files)
    with ThreadPoolExecutor(_NUM_THREADS, "packcast-check") as pool:
        for (file, *_), digests in zip(pieces, pool.map(digests_of, pieces), strict=True):
            tables[file] += digests
    return tables


def digests_of_copy(folder: Path, files: Sequence[FileSpec]) -> list[bytes]:
    """The digests of a written copy; what is missing of a file counts as zeros."""

    def read(file: int, offset: int, into: memoryview) -> None:
        path = folder / files[file].name
        if path.is_file():
            with path.open("rb") as copy:
                copy.seek(offset)
                copy.readinto(into)

    return digests_of_files(files, read)


def wrong_blocks(found: Sequence[bytes], truth: Sequence[bytes]) -> int:
    """How many blocks of all files have a wrong digest."""
    return sum(
        mine[at : at + DIGEST_NBYTES] != right[at : at + DIGEST_NBYTES]
        for mine, right in zip(found, truth, strict=True)
        for at in range(0, len(right), DIGEST_NBYTES)
    )


def wrong_tensors(found: Sequence[int], truth: Sequence[int]) -> int:
    """How many tensors have a wrong sum or are missing."""
    missing = abs(len(found) - len(truth))
    return missing + sum(mine != right for mine, right in zip(found, truth, strict=False))


def sums_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A 64-bit sum of each tensor's bytes, on its device, that depends on their order.

    32-bit words times odd 64-bit multipliers, so that neither swaps nor flipped signs cancel: first
    each row of 1 MiB, then the rows' sums as if they were words. Finds accidents; no signature.
    """
    sums: list[torch.Tensor] = []
    multipliers = torch.empty(0)
    for tensor in tensors:
        words = _words_of(tensor)
        if not sums:
            multipliers = _multipliers(words.device)
        num_whole = words.numel() // _ROW_WORDS * _ROW_WORDS
        matrices = words[:num_whole].view(-1, _ROW_WORDS), words[num_whole:].view(1, -1)
        at_once = _ROWS_AT_ONCE[words.device.type]
        parts = [rows for matrix in matrices for rows in matrix.split(at_once)]
        row_sums = torch.cat(
            [(rows.to(torch.int64) * multipliers[: rows.shape[1]]).sum(1) for rows in parts]
        )
        sums.append((row_sums * multipliers[: row_sums.numel()]).sum())
    return [int(value) for value in torch.stack(sums).tolist()] if sums else []


def _words_of(tensor: torch.Tensor) -> torch.Tensor:
    data = as_bytes("", tensor, tensor.device)
    padded = align_up(data.numel(), _WORD_NBYTES)
    if padded != data.numel() or data.storage_offset() % _WORD_NBYTES:
        aligned = torch.zeros(padded, dtype=torch.uint8, device=data.device)
        aligned[: data.numel()] = data
        data = aligned
    return data.view(torch.int32)


def _multipliers(device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers, the same on all ranks; integer overflow wraps."""
    mixed = torch.arange(1, _ROW_WORDS + 1, dtype=torch.int64, device=device)
    mixed = mixed * -7046029254386353131  # 2**64 over the golden ratio, as a signed number
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1
