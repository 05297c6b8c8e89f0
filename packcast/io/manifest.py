"""Manifests: files with their hashes, in the format of `xxhsum -c` and `sha256sum -c`.

Those programs hash whole files, and a transfer hashes blocks: so a manifest takes a second pass,
which also compares the block digests. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import xxhash

from packcast.errors import CheckpointError, DestinationError, UsageError, VerificationError
from packcast.packed.plan import BLOCK

DigestKind = Literal["xxh128", "sha256"]
SUFFIXES: dict[DigestKind, str] = {"xxh128": ".xxh128", "sha256": ".sha256"}
NUM_THREADS = 8

_PIECE = 8 << 20  # a multiple of the block
_MAX_MANIFEST_NBYTES = 64 << 20
_MAX_LEVELS = 16
_GNU = re.compile(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64}) [ *](.+)")
_BSD = re.compile(r"(?:XXH128|XXH3_128|SHA256) \((.+)\) = ([0-9a-fA-F]{32}|[0-9a-fA-F]{64})")

OnBytes = Callable[[int], None]


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


def hash_of(kind: DigestKind) -> _Hash:
    """An empty hash of the kind."""
    return xxhash.xxh3_128() if kind == "xxh128" else hashlib.sha256()


def hash_file(
    path: Path, kind: DigestKind, on_bytes: OnBytes, *, blocks: bool = False
) -> tuple[str, str | None]:
    """A file's hash as a whole, and with `blocks` its digest as a transfer reports it.

    Raises OSError.
    """
    whole, digests = hash_of(kind), xxhash.xxh3_128()
    memory = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while nbytes := _fill(file, memory):
            on_bytes(nbytes)
            whole.update(memory[:nbytes])
            for begin in range(0, nbytes if blocks else 0, BLOCK):
                digests.update(xxhash.xxh3_128_digest(memory[begin : min(begin + BLOCK, nbytes)]))
    return whole.hexdigest(), digests.hexdigest() if blocks else None


def _fill(file: io.FileIO, memory: memoryview) -> int:
    """Read until the memory is full, or the file is at its end; how many bytes that were."""
    nbytes = 0
    while nbytes < len(memory) and (got := file.readinto(memory[nbytes:])):
        nbytes += got
    return nbytes


def hash_files(
    root: Path,
    names: Sequence[str],
    kind: DigestKind,
    *,
    received: Mapping[str, str] | None = None,
    on_bytes: OnBytes = lambda nbytes: None,
) -> dict[str, str]:
    """The hash of each file under `root`; raises CheckpointError where one cannot be read.

    With `received`, the digests of a transfer by name, raises VerificationError for a file that
    has changed since.
    """

    def one(name: str) -> tuple[str, str | None]:
        try:
            return hash_file(root / name, kind, on_bytes, blocks=received is not None)
        except OSError as error:
            raise CheckpointError(f"{root / name}: cannot be read: {error.strerror}") from error

    with ThreadPoolExecutor(NUM_THREADS, "packcast-hash") as pool:
        found = dict(zip(names, pool.map(one, names), strict=True))
    for name, (_, digest) in found.items():
        if received is not None and received.get(name, digest) != digest:
            raise VerificationError(f"{root / name} has changed since it was received")
    return {name: whole for name, (whole, _) in found.items()}


def refuse_inside(manifest: Path, root: Path, option: str = "--manifest") -> None:
    """Raise UsageError if the manifest would lie inside the copy."""
    inside = os.path.join(os.path.realpath(root), "")
    if os.path.realpath(manifest).startswith(inside):
        raise UsageError(
            f"{option}: {manifest} is inside the copy, and would become part of it",
            hint=f"put it beside it, as in {str(root).rstrip('/')}{SUFFIXES['xxh128']}",
        )


def write_manifest(manifest: Path, root: Path, hashes: Mapping[str, str]) -> None:
    """One line for each file, with its path from the manifest's folder; appears complete.

    Raises DestinationError, and UsageError where it would lie inside of `root`.
    """
    refuse_inside(manifest, root)
    folder = os.path.relpath(os.path.realpath(root), os.path.realpath(manifest.parent))
    lines = []
    for name, digest in sorted(hashes.items()):
        path = os.path.join(folder, name)
        if "\n" in path or "\\" in path:
            raise DestinationError(f"--manifest: {path!r} cannot be listed: no line holds it")
        lines.append(f"{digest}  {path}\n")
    partial = manifest.with_name(f".{manifest.name}.{os.getpid()}")
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        partial.replace(manifest)
    except OSError as error:
        raise DestinationError(f"--manifest: {manifest}: {error.strerror}") from error


def read_manifest(manifest: Path) -> tuple[DigestKind, dict[str, str]]:
    """Its kind, and the hash of each path as it is written there; raises CheckpointError."""
    try:
        if manifest.stat().st_size > _MAX_MANIFEST_NBYTES:
            raise CheckpointError(f"{manifest}: too large for a manifest")
        text = manifest.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise CheckpointError(
            f"{manifest}: cannot be read: {error.strerror}",
            hint="`packcast verify DIR --manifest FILE` writes a manifest of a copy",
        ) from error
    hashes: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        gnu, bsd = _GNU.fullmatch(line), _BSD.fullmatch(line)
        if gnu:
            hashes[gnu[2]] = gnu[1].lower()
        elif bsd:
            hashes[bsd[1]] = bsd[2].lower()
        elif line.strip() and not line.startswith("#"):
            raise CheckpointError(
                f"{manifest}: line {number} is neither XXH128 nor SHA-256 and a file's name",
                hint="`xxhsum -H2` and `sha256sum` write such lists",
            )
    lengths = {len(digest) for digest in hashes.values()}
    if len(lengths) != 1:
        what = "has two kinds of hashes" if lengths else "is empty"
        raise CheckpointError(f"{manifest}: {what}")
    return ("xxh128" if lengths == {32} else "sha256"), hashes


def names_under(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """Each of a manifest's paths by its name under `root`, wherever the manifest was written.

    As many leading folders are taken away as make most of them be there.
    """

    def stripped(level: int) -> dict[str, str]:
        parts = ((path, os.path.normpath(path).split(os.sep)) for path in paths)
        return {
            os.sep.join(it[level:]): path
            for path, it in parts
            if len(it) > level and it[level] not in ("", "..")
        }

    candidates = [stripped(level) for level in range(_MAX_LEVELS)]
    return max(candidates, key=lambda it: sum((root / name).is_file() for name in it))


def manifest_beside(root: Path) -> Path | None:
    """`DIR.xxh128` or `DIR.sha256`, if there is one."""
    for suffix in SUFFIXES.values():
        found = root.with_name(root.name + suffix)
        if root.name and found.is_file():
            return found
    return None
