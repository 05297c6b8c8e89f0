"""Recognises directories that hold no checkpoint, or several, by the names in them."""

from __future__ import annotations

import os
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
    if (real / "snapshots").is_dir() and (real / "blobs").is_dir():
        folder = path / "snapshots"
    elif real.name == "snapshots" and (real.parent / "blobs").is_dir():
        folder = path
    elif any((model / "snapshots").is_dir() for model in real.glob("models--*")):
        models = (model.name.removeprefix("models--") for model in sorted(real.glob("models--*")))
        raise CheckpointError(
            f"{path}: a Hugging Face cache, which holds several models",
            hint=f"give one by its name, as in {some(n.replace('--', '/') for n in models)}",
        )
    else:
        return
    revisions = some(str(folder / revision.name) for revision in sorted(folder.glob("[!.]*")))
    raise CheckpointError(
        f"{path}: a Hugging Face cache folder, which may hold several revisions",
        hint=f"give one of them: {revisions or 'there is none'}",
    )
