"""What came, against what was sent: digests of files' blocks, and weighted sums of tensors.

Runs outside the timed part. Knows bytes and tensors, not how they travelled.
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
    tables = [bytearray(DIGEST_NBYTES * -(-spec.nbytes // BLOCK)) for spec in files]

    def take(piece: tuple[int, int, int]) -> None:
        file, offset, nbytes = piece
        view = memoryview(bytearray(nbytes))
        read(file, offset, view)
        digest = xxhash.xxh3_128_digest
        found = b"".join(digest(view[at : at + BLOCK]) for at in range(0, nbytes, BLOCK))
        at = offset // BLOCK * DIGEST_NBYTES
        tables[file][at : at + len(found)] = found

    pieces = [
        (file, offset, min(_PIECE_NBYTES, spec.nbytes - offset))
        for file, spec in enumerate(files)
        for offset in range(0, spec.nbytes, _PIECE_NBYTES)
    ]
    with ThreadPoolExecutor(_NUM_THREADS, "packcast-check") as pool:
        list(pool.map(take, pieces))
    return [bytes(table) for table in tables]


def digests_of_copy(folder: Path, files: Sequence[FileSpec]) -> list[bytes]:
    """The same of a copy that was written, read again; a missing or short file has other ones."""

    def read(file: int, offset: int, into: memoryview) -> None:
        path = folder / files[file].name
        if path.is_file():
            with path.open("rb") as copy:
                copy.seek(offset)
                copy.readinto(into)

    return digests_of_files(files, read)


def wrong_blocks(found: Sequence[bytes], truth: Sequence[bytes]) -> int:
    """How many blocks of all files have another digest than they should."""
    return sum(
        mine[at : at + DIGEST_NBYTES] != right[at : at + DIGEST_NBYTES]
        for mine, right in zip(found, truth, strict=True)
        for at in range(0, len(right), DIGEST_NBYTES)
    )


def wrong_tensors(found: Sequence[int], truth: Sequence[int]) -> int:
    """How many tensors have another sum than they should, or are missing."""
    missing = abs(len(found) - len(truth))
    return missing + sum(mine != right for mine, right in zip(found, truth, strict=False))


def sums_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A 64-bit sum of each tensor's bytes, on its device, that depends on their places.

    32-bit words times odd 64-bit multipliers, so that neither swaps nor flipped signs cancel: rows
    of 1 MiB first, then their sums as if they were words. Finds accidents: it is no signature.
    """
    sums: list[torch.Tensor] = []
    multipliers: torch.Tensor | None = None
    for tensor in tensors:
        words = _words_of(tensor)
        if multipliers is None or multipliers.device != words.device:
            multipliers = _multipliers(words.device)
        whole = words.numel() // _ROW_WORDS * _ROW_WORDS
        rows = [words[:whole].view(-1, _ROW_WORDS), words[whole:].view(1, -1)]
        at_once = _ROWS_AT_ONCE[words.device.type]
        parts = [_weigh(few, multipliers) for some in rows for few in some.split(at_once)]
        of_rows = torch.cat(parts)
        sums.append((of_rows * multipliers[: of_rows.numel()]).sum())
    return [int(value) for value in torch.stack(sums).tolist()] if sums else []


def _weigh(rows: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    return (rows.to(torch.int64) * multipliers[: rows.shape[1]]).sum(1)


def _words_of(tensor: torch.Tensor) -> torch.Tensor:
    data = as_bytes("", tensor, tensor.device)
    padded = align_up(data.numel(), _WORD_NBYTES)
    if padded != data.numel() or data.storage_offset() % _WORD_NBYTES:
        aligned = torch.zeros(padded, dtype=torch.uint8, device=data.device)
        aligned[: data.numel()] = data
        data = aligned
    return data.view(torch.int32)


def _multipliers(device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers by position, the same everywhere; integer overflow wraps."""
    mixed = torch.arange(1, _ROW_WORDS + 1, dtype=torch.int64, device=device)
    mixed = mixed * -7046029254386353131  # 2**64 over the golden ratio, as a signed number
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1
