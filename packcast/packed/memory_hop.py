"""A hop between two processes of one host: the one downstream copies from the other's memory.

One copy by the kernel (process_vm_readv, as MPI does it) instead of a connection over loopback,
which copies twice and takes three times the processor. A socket carries a message for each piece,
where it lies, and one back once it was copied; it ends with the process at its other end. The
kernel decides who may read whose memory: nothing here widens that.
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
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch

_PIECE = struct.Struct("<QQQ")  # which one it is, its address and bytes
_PROBE = struct.Struct("<Q16s")  # the address of a secret, and the secret
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_COPIED = b"\1"
_MAX_OFFERED = 64  # pieces that are not copied yet: a socket holds at least 200 messages
_LOOK_EVERY_S = 0.1
_FOREVER = timedelta(days=1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


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


def listen() -> tuple[socket.socket, str]:
    """A socket for the rank downstream, and the name at which it listens.

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
    """Upstream: the hop to whoever has connected, if it is this user, who is told how to try."""
    try:
        connection, _ = listener.accept()
    except OSError:  # nobody yet
        return None
    pid, uid = _peer(connection)
    if uid != os.geteuid():
        connection.close()
        return None
    return GivingHop(connection, pid)


def connect(name: str, limit_s: float, check: Callable[[], object]) -> TakingHop | None:
    """Downstream: the hop from the rank that listens there, if its memory can be read.

    Raises what `check` raises during the wait."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    hop = None
    try:
        connection.settimeout(_LOOK_EVERY_S)
        connection.connect(f"\0{name}")
        pid, uid = _peer(connection)
        address, secret = _PROBE.unpack(_probe_of(connection, limit_s, check))
        found = ctypes.create_string_buffer(len(secret))
        read_memory(pid, address, ctypes.addressof(found), len(secret))
        if uid == os.geteuid() and found.raw == secret:
            hop = TakingHop(connection, pid)
    except (OSError, struct.error):
        pass  # not one host after all, or it is forbidden here
    finally:
        if hop is None:
            connection.close()
    return hop


def _probe_of(connection: socket.socket, limit_s: float, check: Callable[[], object]) -> bytes:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(TimeoutError):
            return connection.recv(_PROBE.size)
        check()
    return b""


def _peer(connection: socket.socket) -> tuple[int, int]:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


class SharedPiece:
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
        connection.setblocking(True)
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
            except (OSError, struct.error, KeyError) as error:
                self._fail(f"the next process on this host: {getattr(error, 'strerror', error)}")
            finally:
                self._lock.release()

    def cut(self) -> None:
        """End what is under way, on both sides."""
        self._fail("the connection was closed")

    def close(self) -> None:
        """After the last piece; what is under way ends as by `cut`."""
        self.cut()
        with self._lock:
            self._connection.close()

    def _fail(self, reason: str) -> None:
        self._error = self._error or reason
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

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

    def __init__(self, connection: socket.socket, pid: int) -> None:
        super().__init__(connection, pid)
        self._pieces: deque[bytes] = deque()  # that are not offered yet
        self._num_offered = 0
        self._secret = ctypes.create_string_buffer(os.urandom(16), 16)
        probe = _PROBE.pack(ctypes.addressof(self._secret), self._secret.raw)
        with suppress(OSError):  # it has gone, and says so by not answering
            connection.send(probe, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def start(self, piece: torch.Tensor) -> SharedPiece:
        """Offer the piece; it must stay as it is until the work is over."""
        nbytes = piece.numel() * piece.itemsize
        self._pieces.append(_PIECE.pack(self._num_started, piece.data_ptr(), nbytes))
        self._num_started += 1
        work = SharedPiece(self, self._num_started - 1)
        work.is_completed()  # offers it, if it is its turn
        return work

    def is_over(self, index: int) -> bool:
        if self._num_done <= index and self._error is None:
            with suppress(RuntimeError):
                self.await_piece(index, 0.0)
        return super().is_over(index)

    def _step(self, deadline: float) -> bool:
        # Few at a time, so that neither end ever blocks in a send.
        while self._pieces and self._num_offered < self._num_done + _MAX_OFFERED:
            self._connection.send(self._pieces[0], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            self._pieces.popleft()
            self._num_offered += 1
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

    def start(self, piece: torch.Tensor) -> SharedPiece:
        """Have the next piece copied to this memory."""
        self._pieces[self._num_started] = piece
        self._num_started += 1
        return SharedPiece(self, self._num_started - 1)

    def _step(self, deadline: float) -> bool:
        message = self._receive(_PIECE.size, deadline)
        if message is None:
            return False
        index, address, nbytes = _PIECE.unpack(message)
        piece = self._pieces.pop(self._num_done)
        expected = self._num_done, piece.numel() * piece.itemsize
        if (index, nbytes) != expected:
            text = f"it sends piece {index} of {nbytes} bytes where {expected} was expected"
            raise OSError(0, text)
        read_memory(self._pid, address, piece.data_ptr(), nbytes)
        # An answer that can be sent proves that the memory was still lent: the other end cuts the
        # connection before it uses it again.
        self._connection.send(_COPIED, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        self._num_done += 1
        return True
