"""The cache of Hugging Face's libraries, whose folders hold more than one checkpoint.

Looks at names only.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from packcast.checkpoint.roles import some
from packcast.errors import CheckpointError

_MAX_COMMIT_LENGTH = 200


def refuse_cache_folder(path: Path) -> None:
    """Raise CheckpointError where the path is such a folder, but not one revision in it."""
    real = path.resolve()
    if _is_of_a_model(real):
        model, folder = real, path / "snapshots"
    elif real.name == "snapshots" and _is_of_a_model(real.parent):
        model, folder = real.parent, path
    elif any((found / "snapshots").is_dir() for found in real.glob("models--*")):
        raise CheckpointError(
            f"{path}: a Hugging Face cache, which holds several models",
            hint=f"give one by its name, as in {_names(real)}",
        )
    else:
        return
    snapshots = sorted(found.name for found in folder.glob("[!.]*"))
    if not snapshots:
        raise CheckpointError(
            f"{path}: a model's folder in a Hugging Face cache, with no snapshot in it",
            hint=f"`hf download {_name(model)}` makes one",
        )
    refs = _refs(model)
    told = some(f"{name} ({', '.join(refs[name])})" if name in refs else name for name in snapshots)
    nameless = "" if refs else ", and no refs that give them names"
    raise CheckpointError(
        f"{path}: a model's folder in a Hugging Face cache, with the"
        f" snapshot{'s' * (len(snapshots) > 1)} {told}{nameless}",
        hint=f"give one of them: {some(str(folder / name) for name in snapshots)}",
    )


def _is_of_a_model(folder: Path) -> bool:
    is_named_so = folder.name.startswith("models--") or (folder / "blobs").is_dir()
    return is_named_so and (folder / "snapshots").is_dir()


def _refs(model: Path) -> dict[str, list[str]]:
    """What people call each snapshot."""
    found: dict[str, list[str]] = {}
    for file in sorted((model / "refs").rglob("*")):
        with suppress(OSError, ValueError):
            commit = file.read_text()[:_MAX_COMMIT_LENGTH].strip()
            found.setdefault(commit, []).append(str(file.relative_to(model / "refs")))
    return found


def _name(folder: Path) -> str:
    """Of a model, as people call it."""
    return folder.name.removeprefix("models--").replace("--", "/")


def _names(cache: Path) -> str:
    """Of the models in a cache."""
    return some(map(_name, sorted(cache.glob("models--*"))))
