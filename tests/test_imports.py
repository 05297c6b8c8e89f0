"""Help, version, inspect and dry runs never import torch; public names are what `__all__` says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import packcast

PROBE = """
import sys
from packcast.cli.app import run
code = run(sys.argv[1:])
heavy = [name for name in ("torch", "numpy", "triton") if name in sys.modules]
print(f"code {code}, heavy {heavy}", file=sys.stderr)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return str(path)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["send", "--help"],
        ["recv", "--help"],
        ["bench", "--help"],
        ["--version"],
        ["inspect", "CKPT", "--tensors"],
        ["send", "CKPT", "--dry-run", "--json", "-"],
        ["send", "CKPT", "--dry-run", "--include", "a"],
    ],
    ids=" ".join,
)
def test_what_moves_no_data_imports_no_torch(argv: list[str], checkpoint: str) -> None:
    argv = [checkpoint if word == "CKPT" else word for word in argv]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "code 0, heavy []\n"
    assert done.stdout


def test_help_does_without_pydantic_too() -> None:  # typer imports it for a command's own
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace('"triton"', '"pydantic"'), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "code 0, heavy []\n"


def test_importing_the_package_imports_next_to_nothing() -> None:
    program = "import sys, packcast; print([n for n in sys.modules if n.startswith('packcast.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in packcast.__all__:
        public = getattr(packcast, name)
        called = name.replace("packed_nccl_", "packed_")  # another name of the same function
        assert isinstance(public, int) if name.isupper() else public.__name__ == called
    with pytest.raises(AttributeError, match="nonsense"):
        _ = packcast.nonsense


def test_the_version_is_told_and_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from packcast.cli.app import run

    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"packcast {packcast.__version__} (")
