"""Copies the attributes of one directory to another: owner, mode, extended attributes (access lists
and labels too) and file system flags.

Knows descriptors only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from contextlib import suppress

from packcast.io.sinks.ownership import path_open

# linux/fs.h: FS_IOC_GETFLAGS and the rest, where ioctl numbers are made as on most architectures.
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_GET_XATTR, _SET_XATTR = 0x801C581F, 0x401C5820
# Flags that a directory hands down or that say how it is written: sync, no dump, no atime,
# dirsync, compressed, no copy on write. Not immutable and append-only, under which nothing works.
_KEPT_FLAGS = 0x8 | 0x40 | 0x80 | 0x10000 | 0x4 | 0x800000
_FSXATTR = struct.Struct("=5I8s")  # flags, extent size, extents, project, extent size for copies
_PROJECT_INHERIT = 0x200
_NOT_HERE = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL})


def can_give_owner(status: os.stat_result) -> bool:
    """Whether this process may make a directory of the same owner and group."""
    if os.geteuid() == 0:
        return True
    return status.st_uid == os.geteuid() and status.st_gid in {os.getegid(), *os.getgroups()}


def take_over_attributes(target: str, new_fd: int) -> list[str]:
    """Copy the attributes of `target` to the directory that will replace it; returns warnings.

    The owner first, since a change of owner clears bits of the mode. The new directory stays
    writable for its owner, since files are still to come.
    """
    missing = []
    with path_open(target) as fd:
        old, new = os.fstat(fd), os.fstat(new_fd)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            try:
                os.fchown(new_fd, old.st_uid, old.st_gid)
            except OSError:
                missing.append("owner and group")
        if not _copy_xattrs(fd, new_fd):
            missing.append("extended attributes")
        if not _copy_flags(fd, new_fd):
            missing.append("flags or project")
        os.fchmod(new_fd, stat.S_IMODE(old.st_mode) | 0o700)
    return [f"{target} could not keep its {' and '.join(missing)}"] if missing else []


def _copy_xattrs(from_fd: int, to_fd: int) -> bool:
    try:
        wanted = {name: os.getxattr(from_fd, name) for name in os.listxattr(from_fd)}
        there = {name: os.getxattr(to_fd, name) for name in os.listxattr(to_fd)}
    except OSError as error:
        return error.errno in _NOT_HERE
    all_given = True
    for name in there.keys() - wanted.keys():  # a default access list, inherited from the parent
        with suppress(OSError):
            os.removexattr(to_fd, name)
    for name, value in wanted.items():
        if there.get(name) != value:
            try:
                os.setxattr(to_fd, name, value)
            except OSError:
                all_given = False
    return all_given


def _copy_flags(from_fd: int, to_fd: int) -> bool:
    try:
        wanted, is_now = _flags(from_fd), _flags(to_fd)
        if (wanted ^ is_now) & _KEPT_FLAGS:
            flags = (is_now & ~_KEPT_FLAGS) | (wanted & _KEPT_FLAGS)
            fcntl.ioctl(to_fd, _SET_FLAGS, struct.pack("@l", flags))
        _copy_project(from_fd, to_fd)
    except OSError as error:
        return error.errno in _NOT_HERE
    return True


def _flags(fd: int) -> int:
    answer = fcntl.ioctl(fd, _GET_FLAGS, bytes(struct.calcsize("@l")))
    return int(struct.unpack("@l", answer)[0]) & 0xFFFFFFFF


def _copy_project(from_fd: int, to_fd: int) -> None:
    """The project that quotas count the directory for, and whether what is made in it inherits."""
    empty = bytes(_FSXATTR.size)
    wanted = _FSXATTR.unpack(fcntl.ioctl(from_fd, _GET_XATTR, empty))
    is_now = _FSXATTR.unpack(fcntl.ioctl(to_fd, _GET_XATTR, empty))
    inherit = wanted[0] & _PROJECT_INHERIT
    if (wanted[3], inherit) != (is_now[3], is_now[0] & _PROJECT_INHERIT):
        flags = (is_now[0] & ~_PROJECT_INHERIT) | inherit
        given = _FSXATTR.pack(flags, is_now[1], is_now[2], wanted[3], is_now[4], is_now[5])
        fcntl.ioctl(to_fd, _SET_XATTR, given)
