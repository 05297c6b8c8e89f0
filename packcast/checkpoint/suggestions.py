"""Hints for mistyped names of paths and tensors. Opens no file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from packcast.checkpoint.reading import SHOWN_NAMES, some

_MAX_LOOKED_AT = 10_000
_PARTS = re.compile(r"[^.*?\[\]/]+")


def hint_for_path(path: Path) -> str:
    """The hint for a path that does not exist."""
    if near := near_paths(path):
        return f"did you mean {' or '.join(near)}?"
    above, name = _first_missing(path)
    return f"the directory {above.absolute()} has no entry {name}"


def near_paths(path: Path) -> list[str]:
    """Existing paths with a name similar to that of a path that does not exist."""
    above, name = _first_missing(path)
    try:
        names = [entry.name for entry in islice(os.scandir(above), _MAX_LOOKED_AT)]
    except OSError:
        return []
    return [str(above / near) for near in get_close_matches(name, sorted(names), SHOWN_NAMES)]


def _first_missing(path: Path) -> tuple[Path, str]:
    """The deepest folder that exists, and the part of the path that it lacks."""
    while not path.parent.is_dir() and path.parent != path.parent.parent:
        path = path.parent
    return path.parent, path.name


def hint_for_tensors(globs: Iterable[str], names: Iterable[str]) -> str:
    """The hint for globs that match no tensor: the tensors whose names have most parts in common
    with them, once for all layers."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    words = {part for name in kinds.values() for part in _PARTS.findall(name)}
    wanted = {part for glob in globs for part in _PARTS.findall(glob) if not part.isdecimal()}
    near = {match for part in wanted for match in get_close_matches(part, words, SHOWN_NAMES)}
    shared = {name: len(near & set(_PARTS.findall(name))) for name in kinds.values()}
    best = [name for name in shared if shared[name] and shared[name] == max(shared.values())]
    what = "near names are" if best else "its tensors are"
    return f"{what} {some(best or shared)}; `packcast inspect CKPT --tensors` lists all"
