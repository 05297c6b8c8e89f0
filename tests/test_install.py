"""Claims about what is installed: from a checkout or an sdist, with a compiler and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.forge import REPOSITORY
from tests.helpers.native import compiler

POOL = f"packcast/io/_pool{sysconfig.get_config_var('EXT_SUFFIX')}"
# Either there is a C compiler, or calling it fails.
COMPILERS = [
    pytest.param(
        None, marks=pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
    ),
    "false",
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project as it is cloned: nothing is compiled."""
    into = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "packcast", into / "packcast", ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, into)
    return into


def build(project: Path, kind: str, cc: str | None = None) -> Path:
    """A `wheel` or an `sdist`, by the build backend as pip calls it."""
    program = f"from setuptools import build_meta as it; print(it.build_{kind}('dist'))"
    environ = os.environ | ({"CC": cc} if cc else {})
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=project,
        env=environ,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return project / "dist" / done.stdout.split()[-1]


def said_by(wheel: Path, *arguments: str, folder: Path) -> str:
    """What the wheel's packcast prints, and nothing of any other one."""
    zipfile.ZipFile(wheel).extractall(folder)
    done = subprocess.run(
        [sys.executable, "-m", "packcast", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={name: os.environ[name] for name in os.environ if name != "PACKCAST_POOL"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("cc", COMPILERS)
@pytest.mark.parametrize("through_sdist", [False, True], ids=["checkout", "sdist"])
def test_a_wheel_is_built_with_a_compiler_or_without_and_says_which_pool_it_has(
    checkout: Path, tmp_path: Path, cc: str | None, through_sdist: bool
) -> None:
    project = checkout
    if through_sdist:
        with tarfile.open(build(checkout, "sdist", cc)) as archive:
            archive.extractall(tmp_path, filter="data")
        (project,) = tmp_path.glob("packcast-*")
    wheel = build(project, "wheel", cc)
    names = zipfile.ZipFile(wheel).namelist()
    assert (POOL in names) is (cc is None)
    assert {"packcast/py.typed", "packcast/result.schema.json"} <= set(names)
    expected = "native" if cc is None else "python"
    said = said_by(wheel, "--version", folder=tmp_path / "unpacked")
    assert f"({expected} I/O threads, " in said
