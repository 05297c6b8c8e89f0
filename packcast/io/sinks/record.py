"""The record in a partial directory: which process made it, and whether that process still runs.

A killed process cannot remove its partial directory. So each directory has a record that its
process keeps locked: if another process gets the lock, the owner is dead. On network and user-space
file systems a lock proves nothing; there the owner's pid must be gone, on this machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from packcast.errors import DestinationError
from packcast.io.sinks.ownership import RECORD, folder_open
from packcast.io.syscalls import is_local

_MAX_RECORD_NBYTES = 4096
_MAX_HOST_LENGTH = 255
_REMOVAL_LIMIT_S = 2.0
_RECORD_LIMIT_S = 2.0  # from making a partial directory to its record
_LOOK_S = 0.02
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = "/proc/self/ns/pid"
_RECORD_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NONCE = re.compile(r"[0-9a-f]{32}")

# unused: verified; used: its process runs; unknown: no lock or record to decide by.
State = Literal["unused", "used", "unknown"]


def claim(partial_fd: int) -> int:
    """Put a locked record into a new partial directory; the lock lasts as long as the descriptor.

    The record's text comes after the lock: a text without a lock has lost its process.
    """
    fd = os.open(
        RECORD, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=partial_fd
    )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        locked = True
    except OSError:  # this file system has no locks
        locked = False
    pid = os.getpid()
    record = {
        "version": 1,
        "host": socket.gethostname(),
        "pid": pid,
        "started": _start_of(pid),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "locked": locked,
        "nonce": secrets.token_hex(16),
    }
    try:
        os.write(fd, json.dumps(record).encode("ascii"))
    except OSError:
        os.close(fd)
        raise
    return fd


def nonce_of(record_fd: int) -> str | None:
    """What no other partial directory has, on whatever host; None without a record of this kind."""
    nonce = (_read_record(record_fd) or {}).get("nonce")
    return nonce if isinstance(nonce, str) and _NONCE.fullmatch(nonce) else None


def _nonce_in(folder_fd: int) -> str | None:
    try:
        record_fd = os.open(RECORD, os.O_RDONLY | _RECORD_FLAGS, dir_fd=folder_fd)
    except OSError:
        return None
    try:
        return nonce_of(record_fd)
    finally:
        os.close(record_fd)


def check_in_use(holder_fd: int, name: str, path: str) -> str | None:
    """The directory's nonce; DestinationError unless another rank of this transfer holds it.

    Otherwise this rank would drop its bytes although no rank writes them. A directory that was made
    just now gets its record within the limit. FileNotFoundError if it is there no more: the rank
    that made it has failed, or is about to say so.
    """
    deadline = time.monotonic() + _RECORD_LIMIT_S
    while True:
        try:
            with folder_open(holder_fd, name) as folder_fd, look(folder_fd) as (state, owner):
                nonce = _nonce_in(folder_fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise in_the_way(path) from error
        if state != "unused" and owner is not None:
            return nonce
        if state == "unused" or time.monotonic() > deadline:
            raise in_the_way(path)
        time.sleep(_LOOK_S)


def in_the_way(path: str) -> DestinationError:
    """The partial directory of this transfer exists, but is none of its ranks'."""
    return DestinationError(
        f"{path} already exists, and no rank of this transfer created it",
        hint="find out which process created it, and remove it",
    )


def give_up_claim(partial_fd: int, claim_fd: int) -> None:
    """Remove the record of a complete copy. Closes `claim_fd`.

    Emptied first: unlocked and with its text, the copy would count as left behind. Closed before
    the name goes, or NFS would keep a hidden file in its place.
    """
    try:
        os.ftruncate(claim_fd, 0)
    finally:
        os.close(claim_fd)
    os.unlink(RECORD, dir_fd=partial_fd)


@contextmanager
def look(folder_fd: int) -> Iterator[tuple[State, str | None]]:
    """State and owner of a partial directory. If it is unused, the block holds the lock."""
    try:
        fd = os.open(RECORD, os.O_RDWR | _RECORD_FLAGS, dir_fd=folder_fd)
    except OSError:
        fd = -1
    if fd < 0:
        yield "unknown", None
        return
    try:
        yield _state_of(folder_fd, fd)
    finally:
        os.close(fd)


def _state_of(folder_fd: int, fd: int) -> tuple[State, str | None]:
    record = _read_record(fd)
    if record is None:
        return "unknown", None
    owner = f"pid {record['pid']} on {record['host']}"
    try:
        _lock(fd, record)
    except BlockingIOError:
        return "used", owner
    except OSError:
        return "unknown", owner
    # Again: before we got the lock, its owner may have emptied it, since the copy is complete.
    record = _read_record(fd)
    if record is None or not record["locked"]:
        return "unknown", owner
    # A local file system belongs to one kernel, whose locks hold. Elsewhere a lock may be visible
    # to this host or mount only; there the owner's pid must be gone from this machine.
    return "unused" if is_local(folder_fd) or _has_ended(record) else "unknown", owner


def _lock(fd: int, record: dict[str, object]) -> None:
    """Raises BlockingIOError if another process has the lock; waits for one that is removing it."""
    deadline = time.monotonic() + _REMOVAL_LIMIT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline or not _has_ended(record):
                raise
        time.sleep(_LOOK_S)


def _read_record(fd: int) -> dict[str, object] | None:
    try:
        record = json.loads(os.pread(fd, _MAX_RECORD_NBYTES, 0))
        if record["version"] != 1:
            return None
        return {
            "pid": int(record["pid"]),
            "host": str(record["host"])[:_MAX_HOST_LENGTH],
            "started": record["started"],
            "boot_id": record["boot_id"],
            "pid_namespace": record["pid_namespace"],
            "locked": record["locked"] is True,
            "nonce": record.get("nonce"),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_ended(record: dict[str, object]) -> bool:
    """Whether this process would see the record's one, and does not."""
    here = (_boot_id(), _pid_namespace())
    if None in here or (record["boot_id"], record["pid_namespace"]) != here:
        return False
    pid = record["pid"]
    assert isinstance(pid, int)
    return _start_of(pid) != record["started"]


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink(_PID_NAMESPACE)
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    """When the process was started, in ticks since boot; None if it does not exist."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # pid (name, which may hold anything) state ... ; the start is the 22nd word
    return int(stat_line.rpartition(b")")[2].split()[19])
