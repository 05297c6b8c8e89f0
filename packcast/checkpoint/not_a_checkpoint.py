"""Recognises directories that hold no checkpoint, or several, by the names in them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from packcast.checkpoint.reading import some
from packcast.errors import CheckpointError

_BY_SUFFIX = (
    (".distcp", "a torch.distributed.checkpoint directory", "save it as safetensors first"),
    (".gguf", "a directory of GGUF files", "packcast sends safetensors only"),
    (".onnx", "an ONNX export", "packcast sends safetensors only"),
    (".parquet", "a dataset, not a model", "packcast sends safetensors only"),
    (".arrow", "a dataset, not a model", "packcast sends safetensors only"),
    (".h5", "a Keras checkpoint", "convert it to safetensors first"),
    (".msgpack", "a Flax checkpoint", "convert it to safetensors first"),
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_NAMES = 10_000
_MAX_COMMIT_LENGTH = 200


def what_folder_is(path: Path) -> tuple[str, str]:
    """A phrase for a directory without safetensors files, and the next step."""
    try:
        names = sorted(os.listdir(path))[:_MAX_NAMES]
    except OSError:
        names = []
    if not names:
        return "it is empty", "give the directory that holds the .safetensors files"
    if (path / "hub").is_dir() and any((path / "hub").glob("models--*")):
        return "the home of the Hugging Face cache", "give a model's name, as in org/name"
    if path.resolve().name.startswith("datasets--"):
        return "a dataset in the Hugging Face cache", "packcast sends safetensors only"
    if pickles := some(name for name in names if name.endswith(_PICKLES)):
        what = f"a PyTorch (pickle) checkpoint: {pickles}"
        return what, f"convert {pickles} to safetensors first"
    for suffix, what, hint in _BY_SUFFIX:
        if any(name.endswith(suffix) for name in names):
            return what, hint
    return f"it holds {some(names)}", "give the directory that holds the .safetensors files"


def refuse_cache_folder(path: Path) -> None:
    """Raise CheckpointError for a folder of a Hugging Face cache that is not one revision."""
    real = path.resolve()
    if _is_of_a_model(real):
        model, folder = real, path / "snapshots"
    elif real.name == "snapshots" and _is_of_a_model(real.parent):
        model, folder = real.parent, path
    elif any((model / "snapshots").is_dir() for model in real.glob("models--*")):
        raise CheckpointError(
            f"{path}: a Hugging Face cache, which holds several models",
            hint="give one by its name, as in "
            + some(_name_of(model) for model in sorted(real.glob("models--*"))),
        )
    else:
        return
    snapshots = sorted(found.name for found in folder.glob("[!.]*"))
    if not snapshots:
        raise CheckpointError(
            f"{path}: a model's folder in a Hugging Face cache, with no snapshot in it",
            hint=f"`hf download {_name_of(model)}` makes one",
        )
    refs = _refs(model)
    named = some(
        f"{name} ({', '.join(refs[name])})" if name in refs else name for name in snapshots
    )
    nameless = "" if refs else ", and no refs that give them names"
    raise CheckpointError(
        f"{path}: a model's folder in a Hugging Face cache, with the"
        f" snapshot{'s' * (len(snapshots) > 1)} {named}{nameless}",
        hint=f"give one of them: {some(str(folder / name) for name in snapshots)}",
    )


def _is_of_a_model(folder: Path) -> bool:
    is_named_so = folder.name.startswith("models--") or (folder / "blobs").is_dir()
    return is_named_so and (folder / "snapshots").is_dir()


def _refs(model: Path) -> dict[str, list[str]]:
    """The names of each snapshot: branches and tags."""
    names: dict[str, list[str]] = {}
    for file in sorted((model / "refs").rglob("*")):
        with suppress(OSError, ValueError):
            commit = file.read_text()[:_MAX_COMMIT_LENGTH].strip()
            names.setdefault(commit, []).append(str(file.relative_to(model / "refs")))
    return names


def _name_of(folder: Path) -> str:
    """The model's name, as in org/name."""
    return folder.name.removeprefix("models--").replace("--", "/")
