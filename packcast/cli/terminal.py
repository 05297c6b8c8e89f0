"""A terminal shared by several ranks: safe text, and a lock for drawing."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import sys
from pathlib import Path

_RANK = re.compile(r"^(packcast: error: )ranks? \d[^:]*: ")


def printable(text: str) -> str:
    """Text of unknown origin with control characters shown as escapes, so that no tensor name,
    file name or peer can move the cursor; line feeds stay."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def say(text: str) -> None:
    """Print a line on standard error."""
    # One write: lines of several ranks on one terminal must not mix. A closed stderr is no error.
    try:
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def say_once(text: str, said: Path) -> None:
    """As `say`, but processes that share the file `said` and standard error print equal lines only
    once. A leading `rank N:` does not make lines differ."""
    line = _stream_id() + _RANK.sub(r"\1", printable(text).replace("\n", "\\n"), count=1) + "\n"
    try:
        with said.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if line in file:
                return
            # Print before noting it: a process that is killed in between has not printed it.
            say(text)
            file.write(line)
    except OSError:  # the launcher has ended and removed the file
        say(text)


def _stream_id() -> str:
    """Identifies standard error: under --redirects or --tee each rank has its own, a file.

    All pipes count as one: the launcher reads and prints them together.
    """
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return ""
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        return ""
    return f"{found.st_dev} {found.st_ino} "


def can_draw() -> bool:
    """Whether standard error is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class TerminalLock:
    """Exclusive right to draw on this terminal; the kernel releases it if the process dies."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def acquire(self) -> bool:
        """True if no other process holds it, or if standard error is no terminal."""
        if self._fd is not None:
            return True
        try:
            # An open file description of our own: a lock on inherited fd 2 would be the parent's
            # and all its children's.
            fd = os.open(os.ttyname(2), os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Let another process draw. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
