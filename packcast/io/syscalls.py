"""System calls that Python lacks, each raising OSError as `os` would.

Knows file descriptors, names and addresses; knows nothing of sinks or transfers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]

# linux/magic.h, and for ZFS and bcachefs their own: file systems of one kernel, on its own disks
# or in its memory. All others may be written by other hosts too.
_LOCAL = {
    "ext": 0xEF53,
    "xfs": 0x58465342,
    "btrfs": 0x9123683E,
    "tmpfs": 0x01021994,
    "ramfs": 0x858458F6,
    "overlay": 0x794C7630,
    "f2fs": 0xF2F52010,
    "zfs": 0x2FC12FC1,
    "bcachefs": 0xCA451A4E,
}
_STATFS_NBYTES = 256  # more than any architecture's
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAMEAT2_NUMBER = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}


def _raise_errno() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


def fallocate(fd: int, nbytes: int) -> None:
    """Reserve the file's first `nbytes` and make it that long.

    Not `os.posix_fallocate`: where the file system cannot do it, glibc writes every block instead.
    """
    while _libc.fallocate(fd, 0, 0, nbytes) != 0:
        if ctypes.get_errno() != errno.EINTR:
            _raise_errno()


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Have the kernel begin to write the file's dirty pages to disk; does not wait for the disk,
    unless its queue is full. fsync reports errors of the disk."""
    if _libc.sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE) != 0:
        _raise_errno()


def exchange(dir_fd: int, one: str, other: str) -> None:
    """Swap two names of one directory in a single step: `renameat2` with RENAME_EXCHANGE."""
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(_libc, "renameat2"):
        failed = _libc.renameat2(dir_fd, names[0], dir_fd, names[1], _RENAME_EXCHANGE)
    else:  # glibc before 2.28 has no wrapper
        number = _RENAMEAT2_NUMBER.get(platform.machine())
        if number is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        at = ctypes.c_long(dir_fd)
        failed = _libc.syscall(
            ctypes.c_long(number), at, names[0], at, names[1], ctypes.c_long(_RENAME_EXCHANGE)
        )
    if failed:
        _raise_errno()


def is_local(fd: int) -> bool:
    """Whether the descriptor's file system is known to belong to this kernel alone."""
    room = ctypes.create_string_buffer(_STATFS_NBYTES)
    if _libc.fstatfs(fd, room) != 0:
        return False
    # The first member: a word; its sign does not matter.
    word = ctypes.c_uint32 if platform.machine() == "s390x" else ctypes.c_ulong
    return word.from_buffer(room).value & 0xFFFFFFFF in _LOCAL.values()


def mount_id(fd: int) -> int | None:
    """The mount of the descriptor; unlike `st_dev` it distinguishes bind mounts."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as facts:
            for line in facts:
                if line.startswith("mnt_id:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


def address_of(data: memoryview) -> int:
    """Where a writable buffer lies; good for as long as the caller keeps the buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def first_difference(one: int, other: int, nbytes: int) -> int | None:
    """The first offset at which two runs of memory differ; None if they are equal.

    memcmp over addresses copies nothing and releases the GIL. `==` of two memoryviews compares
    element by element and holds it.
    """
    if _libc.memcmp(one, other, nbytes) == 0:
        return None
    begin, end = 0, nbytes  # they are equal before `begin` and differ before `end`
    while end - begin > 1:
        middle = (begin + end) // 2
        if _libc.memcmp(one + begin, other + begin, middle - begin) == 0:
            begin = middle
        else:
            end = middle
    return begin
