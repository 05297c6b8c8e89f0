"""What came, against what was sent: digests of files' blocks, and weighted sums of tensors.

Runs outside the timed part. Knows bytes and tensors, not how they travelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from packcast.checkpoint.outgoing import FileSpec
from packcast.packed.plan import BLOCK, DIGEST_NBYTES, align_up
from packcast.packed.tensors import as_bytes

_NUM_THREADS = 8
_PIECE_NBYTES = 8 * BLOCK
_ROW_WORDS = 1 << 18  # of 32 bits: 1 MiB
_BATCH_NBYTES = 16 << 20
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

    32-bit words times odd 64-bit multipliers, so that neither swaps nor flipped signs cancel.
    Finds accidents: it is no signature. Device memory: some 100 MiB for a moment.
    """
    sums: list[torch.Tensor] = []
    multipliers: torch.Tensor | None = None
    for batch in _batches(tensors):
        if multipliers is None or multipliers.device != batch[0].device:
            multipliers = _multipliers(batch[0].device)
        if len(batch) > 1:
            sums.append(_weigh(torch.stack(batch), multipliers) * multipliers[0])
        else:
            sums.append(_sum_of_one(batch[0], multipliers))
    return [value for part in sums for value in part.tolist()]


def _sum_of_one(words: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Rows of 1 MiB first, then their sums as if they were words."""
    num_whole = words.numel() // _ROW_WORDS
    rows = words[: num_whole * _ROW_WORDS].view(num_whole, _ROW_WORDS)
    at_once = _BATCH_NBYTES // (_ROW_WORDS * _WORD_NBYTES) if words.is_cuda else 1
    parts = [_weigh(few, multipliers) for few in rows.split(at_once)] if num_whole else []
    parts.append(_weigh(words[num_whole * _ROW_WORDS :].view(1, -1), multipliers))
    of_rows = torch.cat(parts)
    return (of_rows * multipliers[: of_rows.numel()]).sum().view(1)


def _weigh(rows: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    return (rows.to(torch.int64) * multipliers[: rows.shape[1]]).sum(1)


def _batches(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Each tensor as 32-bit words; small neighbours of one size together, to be weighed at once."""
    batch: list[torch.Tensor] = []
    for tensor in tensors:
        words = _words_of(tensor)
        small = words.numel() <= _ROW_WORDS
        full = len(batch) * words.numel() * _WORD_NBYTES >= _BATCH_NBYTES
        if batch and (full or not small or batch[0].shape != words.shape):
            yield batch
            batch = []
        batch.append(words)
    if batch:
        yield batch


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
