"""Opens a checkpoint: which files it has, under which names, where their bytes are.

Applies the rules of Hugging Face directories to what `walk` lists. Reads headers and indexes, never
a tensor's bytes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from packcast.checkpoint.header_limits import HeaderLimits
from packcast.checkpoint.hub import hint_for_missing
from packcast.checkpoint.index import Index, is_index, read_index
from packcast.checkpoint.names import clashes_of, name_fault
from packcast.checkpoint.not_a_checkpoint import refuse_cache_folder, what_folder_is
from packcast.checkpoint.reading import os_errors, shown, shown_name, some, unreadable
from packcast.checkpoint.roles import (
    INCOMPLETE,
    SENT_ANYWAY,
    chosen_of,
    fitting,
    role_warnings,
    roles_of,
)
from packcast.checkpoint.sourcefile import SourceFile, open_source
from packcast.checkpoint.walk import ALL_MAY, Entry, Kind, leaves_out, outside, walk
from packcast.errors import CheckpointError, PackcastError, UsageError

MAX_INDEXES = 100  # each is compared with every shard


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk: `path` as given, its files by name, and warnings."""

    path: Path
    files: tuple[SourceFile, ...]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def num_tensors(self) -> int:
        return sum(len(file.header.tensors) for file in self.files if file.header)

    @property
    def shards(self) -> tuple[SourceFile, ...]:
        return tuple(file for file in self.files if file.header)

    def fingerprint(self) -> str:
        """A hex digest that two hosts share iff names, sizes and headers of all files are equal."""
        digest = hashlib.sha256()
        for file in self.files:
            header = file.header.json_bytes if file.header else b""
            name = file.name.encode()
            kind = "shard" if file.header else "other"
            digest.update(f"{kind} {len(name)} {file.nbytes} {len(header)} ".encode())
            digest.update(name)
            digest.update(header)
        return digest.hexdigest()


def open_checkpoint(
    path: Path,
    *,
    sidecars: bool = True,
    all_files: bool = False,
    exclude_files: Sequence[str] = (),
    follow_links: bool = False,
) -> Checkpoint:
    """The checkpoint at `path`: one safetensors file, or a directory of shards.

    Without `sidecars` it has only shards and their indexes. With `all_files` it has every
    `.safetensors` file, whatever an index says, and an index need not fit. `exclude_files` are
    globs over logical names of files and folders, as in `fnmatch.fnmatchcase`. `path` may be a
    symlink; links in the directory are followed within it and to the blobs of a Hugging Face
    cache, and with `follow_links` everywhere. Raises CheckpointError, and UsageError where nothing
    is left.
    """
    mode = mode_of(path)
    if stat.S_ISDIR(mode):
        return _open_directory(
            path,
            sidecars=sidecars,
            all_files=all_files,
            exclude_files=exclude_files,
            follow_links=follow_links,
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: neither a file nor a directory")
    if is_index(path.name):
        raise CheckpointError(
            f"{path}: an index, not a checkpoint", hint=f"give its directory: {path.parent}"
        )
    _check_name(path.name)
    if any(leaves_out(glob, path.name) for glob in exclude_files):
        raise UsageError(f"--exclude-files leaves out {path.name}, the only file")
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks, before 3.13
        raise CheckpointError(f"{path.name}: the target of its symlinks does not exist") from error
    with os_errors(str(real.parent)):
        folder_mode = os.stat(real.parent).st_mode & ALL_MAY
    files = (open_source(path.name, real, folder_mode, HeaderLimits()),)
    return Checkpoint(path, files, tuple(_clamped_times(files)))


def mode_of(path: Path) -> int:
    """The type and mode of what lies there. Raises CheckpointError where there is nothing."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError as error:
        what = "a dangling symlink" if path.is_symlink() else "no such file or directory"
        raise CheckpointError(f"{path}: {what}", hint=hint_for_missing(path)) from error
    except OSError as error:
        raise unreadable(str(path), error) from error


def _open_directory(
    path: Path,
    *,
    sidecars: bool,
    all_files: bool,
    exclude_files: Sequence[str],
    follow_links: bool,
) -> Checkpoint:
    if not all_files:
        refuse_cache_folder(path)
    entries, warnings = walk(path, exclude_files, follow_links=follow_links)
    of_kind = {kind: [entry for entry in entries if entry.kind is kind] for kind in Kind}
    open_named = _opener(of_kind[Kind.SHARD])
    indexes = fitting(
        _read_indexes(of_kind[Kind.INDEX], warnings, all_files=all_files),
        {entry.name for entry in of_kind[Kind.SHARD] if entry.found},
        lambda name: open_named(name)[1],
        warnings,
        all_files=all_files,
        exclude_files=exclude_files,
    )
    chosen, left = chosen_of(of_kind[Kind.SHARD], [] if all_files else indexes)
    if not chosen:
        raise _nothing_here(path, left, of_kind[Kind.OTHER_WEIGHTS], exclude_files)
    for entry in left:
        name = shown_name(entry.name)
        warnings.append(f"{name}: not in the index beside it: left out (--all-files takes it)")
    shards = _with_roles([open_named(entry.name)[0] for entry in chosen], indexes, warnings)
    replaced = {index.name for index in indexes if index.is_replaced}
    ruling = [_plain(entry) for entry in of_kind[Kind.INDEX] if entry.name not in replaced]
    others: list[SourceFile] = []
    if sidecars:
        others = _sidecars(of_kind[Kind.SIDECAR], warnings)
        if of_kind[Kind.OTHER_WEIGHTS]:
            names = some(shown_name(entry.name) for entry in of_kind[Kind.OTHER_WEIGHTS])
            warnings.append(f"weights in other formats are left out: {names}")
    files = _without_clashes([*shards, *ruling], others, warnings)
    return Checkpoint(path, files, (*warnings, *_clamped_times(files)))


def _read_indexes(entries: Sequence[Entry], warnings: list[str], *, all_files: bool) -> list[Index]:
    if len(entries) > MAX_INDEXES:
        raise CheckpointError(f"{len(entries)} indexes, more than {MAX_INDEXES}")
    indexes = []
    for entry in entries:
        try:
            index = read_index(_checked(entry), entry.name)
        except CheckpointError as error:
            if not all_files:
                hint = f"{error.hint}; {SENT_ANYWAY}" if error.hint else SENT_ANYWAY
                raise CheckpointError(error.message, hint=hint) from error
            warnings.append(f"{error.message}: sent anyway, because of --all-files")
        else:
            indexes.append(index)
            warnings += index.warnings
    return indexes


def _opener(entries: Sequence[Entry]) -> Callable[[str], tuple[SourceFile, frozenset[str]]]:
    """A function that returns a shard and its tensors' names; opens each shard once."""
    by_name = {entry.name: entry for entry in entries}
    limits = HeaderLimits()

    @cache
    def open_named(name: str) -> tuple[SourceFile, frozenset[str]]:
        entry = by_name[name]
        file = open_source(name, _checked(entry), entry.folder_mode, limits)
        return file, frozenset(file.header.tensors.names if file.header else ())

    return open_named


def _nothing_here(
    path: Path,
    left: Sequence[Entry],
    other_weights: Sequence[Entry],
    exclude_files: Sequence[str],
) -> PackcastError:
    if left:
        what = "its index names none of the .safetensors files beside it"
        return CheckpointError(f"{path}: {what}", hint="--all-files sends them anyway")
    what, hint = what_folder_is(path)
    if other_weights:
        names = some(shown_name(entry.name) for entry in other_weights)
        hint = f"convert {names} to safetensors first"
    if exclude_files:
        left_none = "no .safetensors file is left in this directory by --exclude-files"
        return UsageError(f"{path}: {left_none}", hint="--dry-run shows what a pattern leaves out")
    return CheckpointError(f"{path}: no .safetensors file in this directory: {what}", hint=hint)


def _with_roles(
    shards: Sequence[SourceFile], indexes: Sequence[Index], warnings: list[str]
) -> list[SourceFile]:
    """The shards with the tensors that the indexes declare invalid."""
    headers = {file.name: file.header for file in shards if file.header}
    roles = roles_of(headers, indexes)
    warnings += role_warnings(headers, indexes, roles)
    return [
        replace(file, elsewhere=roles[file.name].elsewhere, unlisted=roles[file.name].unlisted)
        if file.name in roles
        else file
        for file in shards
    ]


def _sidecars(entries: Sequence[Entry], warnings: list[str]) -> list[SourceFile]:
    files = []
    for entry in entries:
        fault = name_fault(entry.name)
        if fault:
            warnings.append(f"{shown(entry.name)}: the name {fault}: left out")
        elif entry.found and not stat.S_ISREG(entry.found.st_mode):
            warnings.append(f"{entry.name}: not a regular file: left out")
        elif entry.is_outside:
            warnings.append(outside(entry.name, "left out"))
        else:
            files.append(_plain(entry))
    return files


def _without_clashes(
    needed: Sequence[SourceFile], others: Sequence[SourceFile], warnings: list[str]
) -> tuple[SourceFile, ...]:
    """All files by name; a sidecar that clashes with another file is left out with a warning."""
    by_name = {file.name: file for file in (*needed, *others)}
    optional = {file.name for file in others}
    left: dict[str, list[str]] = {}
    for kept, out in clashes_of(list(by_name)):  # the needed files first: they are kept
        if out not in optional:
            raise CheckpointError(
                f"{kept} and {out}: not every file system can hold both names",
                hint="rename one of them, or leave it out with --exclude-files",
            )
        left.setdefault(kept, []).append(out)
        del by_name[out]
    warnings += [
        f"{some(names)}: not every file system can hold {'it' if len(names) == 1 else 'them'}"
        f" beside {kept}: left out"
        for kept, names in left.items()
    ]
    return tuple(by_name[name] for name in sorted(by_name))


def _clamped_times(files: Sequence[SourceFile]) -> list[str]:
    clamped = [file.name for file in files if file.mtime_ns != file.state.mtime_ns]
    if not clamped:
        return []
    times = (
        "1 modification time is" if len(clamped) == 1 else f"{len(clamped)} modification times are"
    )
    return [
        f"{times} outside of the years 1678 to 2262, and copied as the nearest one inside:"
        f" {some(clamped)}"
    ]


def _checked(entry: Entry) -> Path:
    """The path of a file that must exist and have a valid name."""
    _check_name(entry.name)
    if entry.found is None:
        raise CheckpointError(
            f"{entry.name}: a dangling symlink to {_target_of(entry.path)}",
            hint=f"{INCOMPLETE}; --exclude-files leaves it out",
        )
    if entry.is_outside:
        raise CheckpointError(
            f"{entry.name}: a symlink to {entry.path}, outside of the checkpoint",
            hint="--follow-links follows it; --exclude-files leaves it out",
        )
    return entry.path


def _target_of(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # a folder above it is the dangling link, or it has changed
        return str(link)


def _check_name(name: str) -> None:
    fault = name_fault(name)
    if fault:
        raise CheckpointError(
            f"{shown(name)}: the name {fault}, so it cannot be sent", hint="rename the file"
        )


def _plain(entry: Entry) -> SourceFile:
    return open_source(entry.name, _checked(entry), entry.folder_mode)
