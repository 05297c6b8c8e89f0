"""What a directory without safetensors files is, as far as names tell, and what to do about it."""

from __future__ import annotations

import os
from pathlib import Path

from packcast.checkpoint.roles import some

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
_MAX_LOOKED_AT = 10_000


def what_folder_is(path: Path) -> tuple[str, str]:
    """A phrase for the directory, and the next step."""
    try:
        names = sorted(os.listdir(path))[:_MAX_LOOKED_AT]
    except OSError:
        names = []
    if not names:
        return "it is empty", "give the directory that holds the .safetensors files"
    if (path / "hub").is_dir() and any((path / "hub").glob("models--*")):
        return "the home of the Hugging Face cache", "give a model's name, as in org/name"
    if path.resolve().name.startswith("datasets--"):
        return "a dataset in the Hugging Face cache", "packcast sends safetensors only"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"a PyTorch (pickle) checkpoint: {some(pickles)}",
            f"convert {some(pickles)} to safetensors first",
        )
    for suffix, what, hint in _BY_SUFFIX:
        if any(name.endswith(suffix) for name in names):
            return what, hint
    return f"it holds {some(names)}", "give the directory that holds the .safetensors files"
