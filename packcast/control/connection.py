"""One connection of the control channel, on the event loop that serves it; both ends use it.

asyncio's own transports drop bytes received before a connection broke, and do not know whether
sent bytes were acknowledged. Both matter for the last message, so this uses the socket itself.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from packcast.control.clock import AwakeClock
from packcast.control.frames import HEARTBEAT, FrameReader, Progress, ProtocolError, progress_of
from packcast.control.messages import MAX_OFFER_NBYTES
from packcast.control.rank_info import RankInfo
from packcast.errors import PackcastError, TransferError
from packcast.units import KIB, MIB

RECEIVE_NBYTES = 64 * KIB
SEND_NBYTES = 256 * KIB  # at once, so that a large message to many delays no other
MAX_UNREAD = 4096  # messages
MAX_UNSENT_NBYTES = MAX_OFFER_NBYTES + MIB

# Finds a dead host on an idle connection after half a minute; a dead process causes EOF.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


def tune(sock: socket.socket) -> None:
    """Set the options of a control connection, on either side."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, seconds)


class Connection:
    """A non-blocking socket, owned until `close`, and the other end's info and progress.

    `address` is the other end's, `local_address` this one's. The owner sets
    `on_frame(connection, kind, body)`, which gets every frame but heartbeats and may raise
    ProtocolError, and `on_end(connection, why)`, which must close: it is called if the other end
    is gone (`why` is None) or has broken the protocol. Both change once a worker has joined.
    """

    __slots__ = (
        "_cannot_send",
        "_clock",
        "_loop",
        "_max_unread_nbytes",
        "_num_unsent",
        "_reader",
        "_unread",
        "_unread_nbytes",
        "_unsent",
        "address",
        "heard",
        "info",
        "local_address",
        "on_end",
        "on_frame",
        "progress",
        "sock",
    )

    def __init__(
        self,
        sock: socket.socket,
        reader: FrameReader,
        loop: asyncio.AbstractEventLoop,
        clock: AwakeClock,
        address: str,
        local_address: str,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.address = address
        self.local_address = local_address
        self.on_frame: Callable[[Connection, int, bytes], None]
        self.on_end: Callable[[Connection, str | None], None]
        self.heard = clock.read()
        self.progress = Progress()
        self.info: RankInfo | None = None
        self._unread = self._unread_nbytes = self._max_unread_nbytes = 0
        self._reader = reader
        self._loop = loop
        self._clock = clock
        self._unsent: deque[memoryview] = deque()
        self._num_unsent = 0
        self._cannot_send = False
        loop.add_reader(sock, self.read)

    @property
    def label(self) -> str:
        """By rank and host if known, else by address."""
        return self.info.label if self.info else f"a stranger at {self.address}"

    @property
    def is_open(self) -> bool:
        return self.sock.fileno() >= 0

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def all_arrived(self) -> bool:
        """Whether the other host has acknowledged every byte, or never will."""
        if self._cannot_send or not self.is_open:
            return True
        if self._unsent:
            return False
        try:
            packed = fcntl.ioctl(self.sock, termios.TIOCOUTQ, b"\0" * 4)
        except OSError:
            return True
        return int(struct.unpack("i", packed)[0]) == 0

    def allow(self, limits: dict[int, int]) -> None:
        """Accept these kinds, with their largest sizes, from the next frame on."""
        self._reader.limits = limits
        self._max_unread_nbytes = 2 * max(limits.values(), default=0)

    def count_kept(self, nbytes: int) -> None:
        """Count a message that waits to be fetched; ProtocolError for too many."""
        self._unread += 1
        self._unread_nbytes += nbytes
        if self._unread > MAX_UNREAD or self._unread_nbytes > self._max_unread_nbytes:
            raise ProtocolError("too many messages that no thread fetches")

    def count_fetched(self) -> None:
        """One of them was fetched."""
        self._unread -= 1
        if not self._unread:
            self._unread_nbytes = 0

    def send(self, frame: bytes) -> None:
        """Send the frame, or queue it; ends the connection if too much is queued."""
        if self._cannot_send or not self.is_open:
            return
        if self._num_unsent + len(frame) > MAX_UNSENT_NBYTES:
            self._end("it does not receive what is sent to it")
            return
        self._unsent.append(memoryview(frame))
        self._num_unsent += len(frame)
        if len(self._unsent) == 1:
            self._flush()
            if self._unsent:
                self._loop.add_writer(self.sock, self._on_writable)

    def read(self) -> None:
        """Receive once; calls `on_end` at the end of the connection."""
        if not self.is_open:
            return
        try:
            data = self.sock.recv(RECEIVE_NBYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self.heard = self._clock.read()
            self._reader.feed(data)
            self.take_frames()
        else:
            # Last, so that messages before the end still count, above all an ABORT.
            self._end(None)

    def take_frames(self) -> None:
        """Handle the complete frames in the reader."""
        try:
            while self.is_open and (frame := self._reader.next_frame()) is not None:
                kind, body = frame
                if kind == HEARTBEAT:
                    self.progress = progress_of(body)
                else:
                    self.on_frame(self, kind, body)
        except ProtocolError as error:
            self._end(f"it broke the protocol: {error}")

    def close(self) -> None:
        """Close the socket; `on_end` is not called any more."""
        if self.is_open:
            self._loop.remove_reader(self.sock)
            self._loop.remove_writer(self.sock)
            self._unsent.clear()
            self.sock.close()

    def _end(self, why: str | None) -> None:
        if self.is_open:
            self.on_end(self, why)

    def _on_writable(self) -> None:
        self._flush()
        if not self._unsent and self.is_open:
            self._loop.remove_writer(self.sock)

    def _flush(self) -> None:
        """Send what the socket takes now, up to a limit."""
        allowance = SEND_NBYTES
        while self._unsent and allowance > 0:
            try:
                sent = self.sock.send(self._unsent[0][:allowance])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                # Not yet a loss: its reason may still be in the receive buffer.
                self._cannot_send = True
                self._unsent.clear()
                return
            allowance -= sent
            self._num_unsent -= sent
            if sent == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][sent:]


@dataclass(frozen=True, slots=True)
class Incident:
    """The loss or the ABORT of one rank: it ends the transfer, unless that is committed."""

    connection: Connection
    error: PackcastError
    is_loss: bool = False

    @property
    def weight(self) -> int:
        """The largest of several simultaneous ones is the cause, the others are consequences.

        Prefer a rank's specific error to a loss, and a loss to a TransferError, which may only
        follow from another rank's loss.
        """
        if self.is_loss:
            return 2
        return 1 if isinstance(self.error, TransferError) else 3
