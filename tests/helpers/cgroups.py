"""Real control groups with a limit on memory, where this machine lets us make one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.commands import eventually

_MOUNTED = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


@contextmanager
def control_group(limit_nbytes: int) -> Iterator[Path]:
    """A group with this limit, gone in the end; where there can be none the test is skipped."""
    folder = _made(limit_nbytes)
    if folder is None:
        pytest.skip("no control group can be made here")
    try:
        yield folder
    finally:
        eventually(lambda: _is_removed(folder), "the end of all processes in the group")


def inside(group: Path, *argv: str | Path) -> list[str]:
    """The command line of a program that runs in the group."""
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    return ["sh", "-c", enter, "-", *map(str, argv)]


def _made(limit_nbytes: int) -> Path | None:
    for mount, limit in _MOUNTED:
        folder = mount / f"packcast-test-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(limit_nbytes))
        except OSError:
            folder.rmdir()
            continue
        return folder
    return None


def _is_removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
