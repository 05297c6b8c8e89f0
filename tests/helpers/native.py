"""The compiled pool, built anew from its source: as it is installed, or changed for a test."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import packcast.io

SOURCE = Path(packcast.io.__file__).with_name("_pool.c")
HELD_READS = Path(__file__).parent / "held_disk" / "held_reads.h"
STRICT = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")

_folders: list[tempfile.TemporaryDirectory[str]] = []  # until the interpreter ends


def compiler() -> str | None:
    """This machine's C compiler, if it has one."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


@functools.cache
def built(*flags: str, program: Path | None = None) -> Path | None:
    """The pool as a library, or with its driver as a program; None where that cannot be built.

    With `flags` only: what is wrong with our source, and not with the compiler, is an error.
    """
    cc = compiler()
    if cc is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="packcast-pool-")
    _folders.append(folder)
    into = Path(folder.name) / ("driver" if program else "_pool.so")
    what = [str(program)] if program else ["-shared", "-fPIC", str(SOURCE)]
    # Sanitizers are not everywhere: without their runtime nothing can be linked, or run.
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    if sanitizers and not _runs(cc, sanitizers, Path(folder.name)):
        return None
    done = subprocess.run(
        [cc, *STRICT, *flags, *what, "-o", str(into)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return into


def _runs(cc: str, flags: list[str], folder: Path) -> bool:
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    probe = folder / "probe"
    command = [cc, *flags, str(folder / "probe.c"), "-o", str(probe)]
    return not (
        subprocess.run(command, capture_output=True).returncode
        or subprocess.run([probe], capture_output=True).returncode
    )
