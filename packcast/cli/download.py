"""A checkpoint as people name it: a path, or a model's name that is looked up, or downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from packcast.checkpoint.hub import HubModel, model_of, resolved
from packcast.cli.parsing import path
from packcast.errors import CheckpointError, UsageError, first_line


def checkpoint_path(
    text: str,
    environ: Mapping[str, str] = os.environ,
    *,
    download: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The path of a checkpoint: a file, else in the Hugging Face cache, downloaded if asked.

    A name that is found nowhere is returned unchanged; opening it raises the error, with a hint.
    """
    given = path(text)
    found = resolved(given, environ)
    if found != given or os.path.lexists(given):
        return found
    model = model_of(text)
    if not download:
        return given
    if model is None:
        raise UsageError(
            f"--download: {text} is not a model's name", hint="as in org/name@revision"
        )
    return _download(model, say)


def _download(model: HubModel, say: Callable[[str], None] | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            "--download needs huggingface_hub",
            hint=f"pip install 'packcast[hub]', or `{model.command}` where that is installed",
        ) from None
    if say:
        say(f"downloading {model.name} ({model.revision or 'main'})")
    try:
        return Path(snapshot_download(model.name, revision=model.revision))
    except Exception as error:  # the library's own, of the network, of a gate
        raise CheckpointError(
            f"{model.name}: cannot be downloaded: {first_line(error)}",
            hint=f"`{model.command}` may say more",
        ) from error
