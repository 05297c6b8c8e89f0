"""Small disks that can be full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def small_tmpfs(mount: Path, nbytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes at `mount`, for a fixture; skips where none can be mounted."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)
