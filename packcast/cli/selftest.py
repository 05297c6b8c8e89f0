"""Self-tests of `packcast doctor`: the GPU kernels, and a transfer of a small checkpoint to this
machine itself, whose copy is compared."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from packcast.errors import PackcastError, TransferError, error_from_code
from packcast.units import format_duration, format_speed

_NBYTES = 8 << 20
_LIMIT_S = 120.0
# What would make it another transfer, or another launch.
_FOREIGN = ("PACKCAST_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_")
_KEPT = ("PACKCAST_POOL", "PACKCAST_HOPS")


def kernels_fault() -> str | None:
    """Why the kernels do not work on the current GPU; None if they do."""
    import torch

    from packcast.packed.gather import move_on
    from packcast.packed.selftested import faults

    logging.getLogger("packcast").addHandler(logging.NullHandler())  # the caller says it
    works = move_on(torch.device("cuda", torch.cuda.current_device()))
    return None if works else ", ".join(faults)


def self_test(backend: str) -> tuple[str, PackcastError | None]:
    """Run a transfer over this backend; returns a sentence, and the fix if it failed."""
    with tempfile.TemporaryDirectory(prefix="packcast-doctor-") as folder:
        checkpoint, copy = Path(folder, "model"), Path(folder, "copy")
        _make(checkpoint)
        result = Path(folder, "result.json")
        argv = [sys.executable, "-m", "packcast", "send", str(checkpoint), "--nproc", "2"]
        argv += ["--out", str(copy), "--backend", backend, "--json", str(result)]
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in _KEPT or not name.startswith(_FOREIGN)
        }
        try:
            ended = subprocess.run(
                argv, env=kept, capture_output=True, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return _failed(backend, TransferError(f"not finished within {_LIMIT_S:g} s"))
        if ended.returncode:
            said = ended.stderr.decode(errors="replace")
            lines = said.rpartition("packcast: error: ")[2].strip().splitlines() or ["no word"]
            hint = lines[1].strip() if len(lines) > 1 else None
            return _failed(backend, error_from_code(ended.returncode, lines[0], hint))
        for path in checkpoint.iterdir():
            same = False
            with suppress(OSError):
                same = path.read_bytes() == (copy / path.name).read_bytes()
            if not same:
                return _failed(backend, TransferError(f"{path.name} arrived with wrong bytes"))
        document = json.loads(result.read_text())
        seconds = format_duration(document["total_seconds"])
        speed = format_speed(document["bytes_per_second"])
        return f"two ranks over {backend}: all bytes arrived, {speed}, {seconds} in all", None


def _failed(backend: str, error: PackcastError) -> tuple[str, PackcastError]:
    return f"two ranks over {backend}: {error.message}", error


def _make(folder: Path) -> None:
    folder.mkdir()
    entry = {"dtype": "U8", "shape": [_NBYTES], "data_offsets": [0, _NBYTES]}
    header = json.dumps({"weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + os.urandom(_NBYTES)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")
