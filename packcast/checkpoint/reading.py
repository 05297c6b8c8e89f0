"""Opens regular files safely, reads JSON strictly, and recognises files of other formats.

Every failure is a CheckpointError that begins with `where`. Knows nothing of tensors.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packcast.errors import CheckpointError

SHOWN_NAMES = 3

_SHOWN_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class FileState:
    """The state of a file at one moment; with another state its bytes may have changed.

    Copiers set size and modification time back after a write. The inode's change time cannot be
    set; but it also changes with mode, owner or links.
    """

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @staticmethod
    def of(found: os.stat_result) -> FileState:
        return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def difference(self, found: os.stat_result) -> str | None:
        """What has changed, as the end of a sentence; None if nothing has."""
        now = FileState.of(found)
        if now.inode != self.inode:
            return "another file is in its place"
        if now.nbytes != self.nbytes:
            return f"it had {self.nbytes} bytes and has {now.nbytes}"
        if now.mtime_ns != self.mtime_ns:
            return "its modification time is another"
        if now.ctime_ns != self.ctime_ns:
            return "it was written and its time set back, or its mode, owner or links changed"
        return None


def shown(value: object) -> str:
    """A value from a file for a message: escaped and shortened."""
    if isinstance(value, list):  # one level only: a hostile list may nest too deeply for repr
        inner = ("..." if isinstance(item, list | dict) else shown(item) for item in value[:9])
        text = f"[{', '.join(inner)}{', ...' if len(value) > 9 else ''}]"
    elif isinstance(value, dict):
        text = "an object"
    else:
        text = repr(value[: _SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def shown_name(name: str) -> str:
    """A file's name for a message: escaped if it is not printable."""
    return name if name.isprintable() else shown(name)


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - SHOWN_NAMES} more" if len(every) > SHOWN_NAMES else ""
    return ", ".join(every[:SHOWN_NAMES]) + more


@contextmanager
def os_errors(where: str) -> Iterator[None]:
    """Turns OSError into a CheckpointError that names `where`."""
    try:
        yield
    except OSError as error:
        raise unreadable(where, error) from error


@contextmanager
def open_regular(path: Path, where: str) -> Iterator[tuple[int, int]]:
    """The descriptor and size of a regular file; anything else is refused before it is opened.

    Follows no symlink, not even one that has replaced a folder since the path was resolved.
    """
    with os_errors(where):
        fd = open_without_links(path)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{where}: not a regular file")
        yield fd, found.st_size
    finally:
        os.close(fd)


def open_without_links(path: Path) -> int:
    """A descriptor to read an absolute path; OSError if the path has a symlink.

    Each folder is opened in the one above it. Only regular files are opened for reading: opening a
    FIFO would block, and opening a device might have effects.
    """
    folder = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    regular = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    name_only = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    root, *folders, last = path.parts
    fd = os.open(root, folder)
    try:
        for part in folders:
            below = os.open(part, folder, dir_fd=fd)
            os.close(fd)
            fd = below
        is_regular = stat.S_ISREG(os.stat(last, dir_fd=fd, follow_symlinks=False).st_mode)
        return os.open(last, regular if is_regular else name_only, dir_fd=fd)
    finally:
        os.close(fd)


def read_exactly(fd: int, nbytes: int, offset: int, where: str) -> bytes:
    """`nbytes` bytes from `offset` on. The caller has bounded `nbytes`."""
    data = bytearray()
    with os_errors(where):
        while len(data) < nbytes:
            piece = os.pread(fd, nbytes - len(data), offset + len(data))
            if not piece:
                raise CheckpointError(f"{where}: became shorter while it was being read")
            data += piece
    return bytes(data)


def unreadable(where: str, error: OSError) -> CheckpointError:
    """An error of the operating system as a sentence."""
    hint = "check its permissions" if error.errno in (errno.EACCES, errno.EPERM) else None
    reason = (error.strerror or str(error)).lower()
    return CheckpointError(f"{where}: cannot be read: {reason}", hint=hint)


def strict_json(data: bytes, where: str) -> object:
    """JSON by the standard: UTF-8, no NaN; and, stricter, no key twice in one object.

    `-0` is a float, as for other readers, so it is no size or offset. The caller has bounded the
    size of `data`.
    """

    def to_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where}: names {shown(twice)} twice")
        return content

    def refuse_constant(constant: str) -> object:
        raise CheckpointError(f"{where}: {constant} is not JSON")

    try:
        text = data.decode()
        parse_int = _int if "-0" in text else None
        return json.loads(
            text, object_pairs_hook=to_dict, parse_constant=refuse_constant, parse_int=parse_int
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not valid UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise CheckpointError(f"{where}: has a number that is too long") from error


def _int(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def what_it_is(head: bytes) -> tuple[str, str] | None:
    """The format of a file that begins like this, and the next step; None if unknown."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself", "run `git lfs pull` where it was cloned"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return "a web page, perhaps an error page saved in its place", "download it again"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a PyTorch (pickle) checkpoint", "convert it to safetensors first"
    if head.startswith(b"GGUF"):
        return "a GGUF file", "packcast sends safetensors only"
    if text.startswith((b"{", b"[")):
        return "JSON text", "give the checkpoint's directory, or one .safetensors file"
    return None
