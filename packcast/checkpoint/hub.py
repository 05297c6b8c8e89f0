"""Names of models on the Hugging Face Hub, looked up in the local cache: no network, no library.

`org/name`, `org/name@revision`, `hf://org/name`. A path that exists is never taken for a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packcast.checkpoint.reading import some
from packcast.checkpoint.suggestions import hint_for_path, near_paths

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,254}}))?")
_PREFIX = re.compile(r"hf:/{1,2}(?:models/)?")  # as a path it has one slash only
_MAX_REF_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub; the revision's default is `main`."""

    name: str
    revision: str | None

    @property
    def command(self) -> str:
        """The command that downloads it."""
        more = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{more}"


def model_of(text: str) -> HubModel | None:
    """The model that the text could name, even if such a path exists."""
    found = _NAME.fullmatch(_PREFIX.sub("", text, count=1))
    return HubModel(found[1], found[2]) if found else None


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The cache of huggingface_hub, by its environment variables."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    home = environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    above = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(above).expanduser() / "huggingface" / "hub"


def snapshot_of(model: HubModel, environ: Mapping[str, str]) -> Path | None:
    """The model's folder in the cache, if it has the revision."""
    folder = _folder(model, environ)
    revision = model.revision or "main"
    try:
        with (folder / "refs" / revision).open("rb") as file:
            commit = file.read(_MAX_REF_NBYTES).decode().strip()
    except (OSError, ValueError):
        commit = revision
    if not re.fullmatch(r"[A-Za-z0-9._-]+", commit) or commit.startswith("."):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def resolved(path: Path, environ: Mapping[str, str]) -> Path:
    """The cached snapshot of a model of that name; else the path itself."""
    if os.path.lexists(path):
        return path
    model = model_of(str(path))
    return (model and snapshot_of(model, environ)) or path


def hint_for_missing(path: Path, environ: Mapping[str, str] = os.environ) -> str:
    """The hint for a path that does not exist: a similar name, or a model to download."""
    model = model_of(str(path))
    if model is None or near_paths(path):
        return hint_for_path(path)
    there = sorted(found.name for found in (_folder(model, environ) / "snapshots").glob("[!.]*"))
    if there:
        what = f"the cache has {some(f'{model.name}@{found}' for found in there)} only"
    else:
        what = f"if it is a model's name: it is not in the cache {cache_folder(environ)}"
    return f"{what}; `{model.command}` brings it there, or --download"


def _folder(model: HubModel, environ: Mapping[str, str]) -> Path:
    return cache_folder(environ) / f"models--{model.name.replace('/', '--')}"
