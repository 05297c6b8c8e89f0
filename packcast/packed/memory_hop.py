"""A hop between two processes of one host: the one downstream copies from the other's memory.

One copy by the kernel (process_vm_readv, as MPI does it) instead of a connection over loopback,
which copies twice and takes three times the processor. A socket carries a message for each piece,
where it lies, and one back once it was copied; it ends with the process at its other end.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import threading
import time
import weakref
from contextlib import suppress
from datetime import timedelta

import torch

_PIECE = struct.Struct("<QQ")  # address and bytes
_PROBE = struct.Struct("<Q16s")  # the address of a secret, and the secret
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_COPIED = b"\1"
_PR_SET_PTRACER = 0x59616D61  # of the Yama security module, where there is one
_FOREVER = timedelta(days=1)

_libc = ctypes.CDLL(None, use_errno=True)


class _Vector(ctypes.Structure):  # struct iovec
    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def read_memory(pid: int, address: int, into: int, nbytes: int) -> None:
    """Copy from another process's memory; the interpreter is free meanwhile. Raises OSError."""
    done = 0
    while done < nbytes:
        here = _Vector(into + done, nbytes - done)
        there = _Vector(address + done, nbytes - done)
        count = _libc.process_vm_readv(
            pid, ctypes.byref(here), 1, ctypes.byref(there), 1, ctypes.c_ulong(0)
        )
        if count <= 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        done += count


_libc.process_vm_readv.restype = ctypes.c_ssize_t


def listen() -> tuple[socket.socket, str]:
    """A socket for the rank downstream, and the name at which it listens, which nobody can guess.

    It is in no file system, and seen from this network namespace only.
    """
    name = f"packcast-{os.urandom(16).hex()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{name}")
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener, name


def accept(listener: socket.socket) -> GivingHop | None:
    """Upstream: the hop to whoever has connected, if it is this user; tell it how to try."""
    try:
        connection, _ = listener.accept()
    except OSError:  # nobody yet
        return None
    connection.setblocking(True)
    pid, uid, _ = _peer(connection)
    if uid != os.geteuid():
        connection.close()
        return None
    hop = GivingHop(connection, pid)
    hop.offer()
    return hop


def connect(name: str, limit_s: float) -> TakingHop | None:
    """Downstream: the hop from the rank that listens there, if its memory can be read."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(limit_s)
        connection.connect(f"\0{name}")
        pid, uid, _ = _peer(connection)
        address, secret = _PROBE.unpack(connection.recv(_PROBE.size))
        found = ctypes.create_string_buffer(len(secret))
        read_memory(pid, address, ctypes.addressof(found), len(secret))
        if uid == os.geteuid() and found.raw == secret:
            connection.setblocking(True)
            return TakingHop(connection, pid)
    except (OSError, struct.error):
        pass  # not one host after all, or it is forbidden here
    connection.close()
    return None


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(packed)
    return pid, uid, gid


class PieceWork:
    """A piece on its way; as torch's Work. `wait` raises RuntimeError at its limit too."""

    def __init__(self, hop: GivingHop | TakingHop, index: int) -> None:
        self._hop = hop
        self._index = index

    def is_completed(self) -> bool:
        """Whether it is over, well or not. Never blocks."""
        return self._hop.is_over(self._index)

    def wait(self, timeout: timedelta = _FOREVER) -> bool:
        """Block until it is over; raises RuntimeError where it is not, or ended badly."""
        self._hop.await_piece(self._index, time.monotonic() + timeout.total_seconds())
        return True


class _MemoryHop:
    """One end. One thread starts pieces; any thread may wait, look, and `cut` it."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        weakref.finalize(self, connection.close)  # as gloo's connections go with their group
        self._pid = pid
        self._lock = threading.Lock()  # of whoever receives from the connection
        self._num_started = self._num_done = 0
        self._error: str | None = None

    def is_over(self, index: int) -> bool:
        return self._num_done > index or self._error is not None

    def await_piece(self, index: int, deadline: float) -> None:
        """Block until the piece is over; raises RuntimeError at the deadline, and if it failed."""
        while self._num_done <= index:
            if self._error is not None:
                raise RuntimeError(self._error)
            if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise RuntimeError("timed out")
            try:
                is_left = self._error is None and self._num_done <= index
                if is_left and not self._step(deadline):
                    raise RuntimeError("timed out")
            except OSError as error:
                self._error = self._error or f"the next process on this host: {error.strerror}"
            finally:
                self._lock.release()

    def cut(self) -> None:
        """End what is under way, on both sides."""
        self._error = self._error or "the connection was closed"
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """After the last piece; what is under way ends as by `cut`."""
        self.cut()
        with self._lock:
            self._connection.close()

    def _step(self, deadline: float) -> bool:
        """Receive one message and do what it asks for; False at the deadline."""
        raise NotImplementedError

    def _receive(self, nbytes: int, deadline: float) -> bytes | None:
        left_ms = max(0.0, deadline - time.monotonic()) * 1e3
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if not poll.poll(left_ms):
            return None
        message = self._connection.recv(nbytes)
        if not message:
            raise ConnectionResetError(0, "it has closed the connection")
        return message


class GivingHop(_MemoryHop):
    """The end upstream, whose memory is read."""

    def offer(self) -> None:
        """Let the other end read this process's memory, and have it try."""
        self._secret = ctypes.create_string_buffer(os.urandom(16), 16)
        # Without Yama nothing is asked for, and this fails.
        _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(self._pid), 0, 0, 0)
        probe = _PROBE.pack(ctypes.addressof(self._secret), self._secret.raw)
        with suppress(OSError):  # it has gone, and says so by not answering
            self._connection.send(probe, socket.MSG_NOSIGNAL)

    def start(self, piece: torch.Tensor) -> PieceWork:
        """Offer the piece; it must stay as it is until the work is over."""
        self.is_over(self._num_started)  # read the answers that are there: they must not pile up
        with suppress(OSError):  # known by the time it is waited for
            message = _PIECE.pack(piece.data_ptr(), piece.numel() * piece.itemsize)
            self._connection.send(message, socket.MSG_NOSIGNAL)
        self._num_started += 1
        return PieceWork(self, self._num_started - 1)

    def is_over(self, index: int) -> bool:
        if self._num_done <= index and self._error is None:
            with suppress(RuntimeError):
                self.await_piece(index, 0.0)
        return super().is_over(index)

    def close(self) -> None:
        super().close()
        _libc.prctl(_PR_SET_PTRACER, 0, 0, 0, 0)

    def _step(self, deadline: float) -> bool:
        message = self._receive(len(_COPIED), deadline)
        self._num_done += message is not None
        return message is not None


class TakingHop(_MemoryHop):
    """The end downstream, which copies: whoever waits for a piece does it."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        super().__init__(connection, pid)
        self._pieces: dict[int, torch.Tensor] = {}

    def close(self) -> None:
        super().close()
        self._pieces.clear()

    def start(self, piece: torch.Tensor) -> PieceWork:
        """Have the next piece copied to this memory."""
        self._pieces[self._num_started] = piece
        self._num_started += 1
        return PieceWork(self, self._num_started - 1)

    def _step(self, deadline: float) -> bool:
        message = self._receive(_PIECE.size, deadline)
        if message is None:
            return False
        address, nbytes = _PIECE.unpack(message)
        piece = self._pieces.pop(self._num_done)
        if nbytes != piece.numel() * piece.itemsize:
            raise OSError(0, f"it sends {nbytes} bytes where others were expected")
        read_memory(self._pid, address, piece.data_ptr(), nbytes)
        self._num_done += 1
        self._connection.send(_COPIED, socket.MSG_NOSIGNAL)
        return True
