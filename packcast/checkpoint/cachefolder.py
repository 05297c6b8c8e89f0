"""The cache of Hugging Face's libraries, whose folders hold more than one checkpoint.

Looks at names only.
"""

from __future__ import annotations

from pathlib import Path

from packcast.checkpoint.roles import some
from packcast.errors import CheckpointError


def refuse_cache_folder(path: Path) -> None:
    """Raise CheckpointError where the path is such a folder, but not one revision in it."""
    real = path.resolve()
    if (real / "snapshots").is_dir() and (real / "blobs").is_dir():
        folder = path / "snapshots"
    elif real.name == "snapshots" and (real.parent / "blobs").is_dir():
        folder = path
    elif any((found / "snapshots").is_dir() for found in real.glob("models--*")):
        raise CheckpointError(
            f"{path}: a Hugging Face cache, which holds several models",
            hint=f"give one by its name, as in {_names(real)}",
        )
    else:
        return
    revisions = some(str(folder / found.name) for found in sorted(folder.glob("[!.]*")))
    raise CheckpointError(
        f"{path}: a Hugging Face cache folder, which may hold several revisions",
        hint=f"give one of them: {revisions or 'there is none'}",
    )


def _names(cache: Path) -> str:
    """Of the models in a cache, as people call them."""
    folders = sorted(cache.glob("models--*"))
    return some(found.name.removeprefix("models--").replace("--", "/") for found in folders)
