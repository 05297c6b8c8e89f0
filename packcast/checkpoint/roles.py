"""What the indexes of a directory say of its shards: which are sent, and which tensors are valid.

Knows names and headers; opens no file.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cache

from packcast.checkpoint.header import Header
from packcast.checkpoint.index import Index, whole_file_of
from packcast.checkpoint.reading import shown, some
from packcast.checkpoint.walk import Entry, leaves_out
from packcast.errors import CheckpointError, UsageError

INCOMPLETE = "the download or copy is probably incomplete"
SENT_ANYWAY = "--all-files sends what is there"

_SIMILAR = 0.8  # sizes of the same weights in two formats

TensorsIn = Callable[[str], AbstractSet[str]]  # of a shard that is there, by its name


@dataclass(frozen=True, slots=True)
class Roles:
    """A shard's tensors that an index assigns to another shard, or does not name."""

    elsewhere: frozenset[str]
    unlisted: frozenset[str]


def fitting(
    indexes: Sequence[Index],
    there: AbstractSet[str],
    tensors_in: TensorsIn,
    warnings: list[str],
    *,
    all_files: bool,
    exclude_files: Sequence[str],
) -> list[Index]:
    """The indexes that apply to the shards that are `there`; adds to `warnings`.

    An index that names missing shards or tensors is an error. But if the whole model is in one file
    beside it, which loaders prefer, that file replaces its shards.
    """
    ruling = []
    for index in indexes:
        fault, misplaced = _check_fit(index, there, tensors_in)
        whole = whole_file_of(index.name)
        if fault is None:
            ruling.append(index)
            if misplaced:  # a warning only: loaders that read whole shards find these tensors
                count = "1 tensor is" if len(misplaced) == 1 else f"{len(misplaced)} tensors are"
                names = some(map(shown, misplaced))
                warnings.append(f"{index.name}: {count} in another shard than it says: {names}")
        elif all_files:
            ruling.append(index)
            warnings.append(f"{index.name}: {fault}: sent anyway, because of --all-files")
        elif whole in there:
            shard_of = dict.fromkeys(tensors_in(whole), whole)
            ruling.append(replace(index, shard_of=shard_of, is_replaced=True))
            lost = index.shard_of.keys() - shard_of.keys()
            lacks = f", which lacks {len(lost)} of its tensors" if lost else ""
            warnings.append(
                f"{index.name}: {fault}: left out, {whole} is sent in its place{lacks}"
                " (--all-files takes both)"
            )
        else:
            _refuse_exclusion(index, there, exclude_files)
            raise CheckpointError(f"{index.name}: {fault}", hint=f"{INCOMPLETE}; {SENT_ANYWAY}")
    return ruling


def _refuse_exclusion(index: Index, there: AbstractSet[str], exclude_files: Sequence[str]) -> None:
    for shard in sorted(set(index.shard_of.values()) - there):
        if any(leaves_out(glob, shard) for glob in exclude_files):
            raise UsageError(
                f"--exclude-files leaves out {shard}, which {index.name} names",
                hint="--exclude leaves out tensors, and rewrites the index",
            )


def _check_fit(
    index: Index, there: AbstractSet[str], tensors_in: TensorsIn
) -> tuple[str | None, list[str]]:
    """The fault of an index that does not fit its shards, if any, and its misplaced tensors.

    A misplaced tensor is not in the shard that the index names.
    """
    wanted = set(index.shard_of.values())
    if missing := sorted(wanted - there):
        return f"{len(missing)} of {len(wanted)} shards are not there: {some(missing)}", []
    misplaced = [name for name, shard in index.shard_of.items() if name not in tensors_in(shard)]
    known = set[str]().union(*map(tensors_in, wanted)) if misplaced else set[str]()
    lost = [name for name in misplaced if name not in known]
    if not lost:
        return None, misplaced
    fault = f"tensor {shown(lost[0])} is not in {index.shard_of[lost[0]]}, where it should be"
    others = f", nor {len(lost) - 1} others in theirs" if len(lost) > 1 else ""
    return fault + others, misplaced


def chosen_of(shards: Sequence[Entry], indexes: Sequence[Index]) -> tuple[list[Entry], list[Entry]]:
    """The shards to send, and those in the folder of an index that does not name them."""
    named = {shard for index in indexes for shard in index.shard_of.values()}
    ruled = {posixpath.dirname(index.name) for index in indexes}
    chosen: list[Entry] = []
    left: list[Entry] = []
    for entry in shards:
        belongs = entry.name in named or posixpath.dirname(entry.name) not in ruled
        (chosen if belongs else left).append(entry)
    return chosen, left


def roles_of(headers: Mapping[str, Header], indexes: Sequence[Index]) -> dict[str, Roles]:
    """The tensors of each shard that are invalid by the indexes, by the shard's name.

    An index applies to the folders below its own too: their files are another model's, or copies.
    """
    tensors_in = {name: set(header.tensors.names) for name, header in headers.items()}
    named_by = {index.name: set(index.shard_of.values()) for index in indexes}
    by_folder: dict[str, list[Index]] = {}
    for index in indexes:
        by_folder.setdefault(posixpath.dirname(index.name), []).append(index)
    roles = {}
    for shard, tensors in tensors_in.items():
        # The outermost folder that has an index.
        folder = next((f for f in reversed(_folders_around(shard)) if f in by_folder), None)
        ruling = [] if folder is None else by_folder[folder]
        # With two variants in one folder, each index applies to its own shards.
        ruling = [index for index in ruling if shard in named_by[index.name]] or ruling
        if ruling:
            others = {t for t in tensors if all(index.shard_of.get(t) != shard for index in ruling)}
            listed = {t for t in others if any(t in index.shard_of for index in ruling)}
            elsewhere = {
                t
                for t in listed
                if any(t in tensors_in.get(index.shard_of.get(t, ""), ()) for index in ruling)
            }
            roles[shard] = Roles(frozenset(elsewhere), frozenset(others - listed))
    return roles


def _folders_around(name: str) -> list[str]:
    """The folders of a file, from its own to the checkpoint's, which is ''."""
    folders = []
    while name:
        name = posixpath.dirname(name)
        folders.append(name)
    return folders


def role_warnings(
    headers: Mapping[str, Header], indexes: Sequence[Index], roles: Mapping[str, Roles]
) -> list[str]:
    """The warnings about tensors that are not valid, and about copies in folders."""
    warnings = []
    named = {shard for index in indexes for shard in index.shard_of.values()}
    for shard in sorted(named & roles.keys()):
        extra = sorted(roles[shard].unlisted)
        if extra:
            few = some(map(shown, extra))
            warnings.append(f"{shard}: {len(extra)} of its tensors are not in the index: {few}")
    old = [(t, shard) for shard in sorted(roles) for t in sorted(roles[shard].elsewhere)]
    if old:
        few = some(f"{shown(tensor)} in {shard}" for tensor, shard in old)
        copies = "1 tensor is" if len(old) == 1 else f"{len(old)} tensors are"
        warnings.append(
            f"{copies} in another shard too, which the index names instead: {few}; sent with the"
            " files, but not where tensors are received"
        )
    return warnings + _repeated_folders(headers)


def _repeated_folders(headers: Mapping[str, Header]) -> list[str]:
    """Warnings about folders that seem to repeat the weights of a folder above: with the same
    tensor names, or of similar size."""
    in_folder: dict[str, list[Header]] = {}
    for name, header in headers.items():
        in_folder.setdefault(posixpath.dirname(name), []).append(header)
    names_in = cache(lambda folder: _names(in_folder[folder]))
    warnings = []
    for folder, inner in sorted(in_folder.items()):
        around = next((up for up in _folders_around(folder) if up in in_folder), None)
        if not folder or around is None:
            continue
        names, outer_names = names_in(folder), names_in(around)
        small, large = sorted((_data_nbytes(inner), _data_nbytes(in_folder[around])))
        if names & outer_names == names or small >= _SIMILAR * large:
            files = "1 file" if len(inner) == 1 else f"{len(inner)} files"
            warnings.append(
                f"{folder}/ seems to hold the same weights again, {files} of"
                f" {_data_nbytes(inner):,} bytes: --exclude-files '{folder}/*' leaves it out"
            )
    return warnings


def _names(headers: Sequence[Header]) -> set[str]:
    return {name for header in headers for name in header.tensors.names}


def _data_nbytes(headers: Sequence[Header]) -> int:
    return sum(header.file_nbytes - header.data_begin for header in headers)
