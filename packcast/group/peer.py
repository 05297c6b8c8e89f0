"""One connection of the control channel: a socket that never blocks, and what is known of its peer.

Used by the control thread only, but for `queues`, which the inbox's lock guards.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
from collections import deque

from packcast.group.member import Member
from packcast.group.wire import FROM_SENDER, FrameReader, Message, WireError
from packcast.units import KIB, MIB

RECEIVE_NBYTES = 256 * KIB
SEND_NBYTES = 4 * MIB
MAX_UNSENT_NBYTES = FROM_SENDER.of("OFFER") + MIB
MAX_UNREAD_MESSAGES = 4096

# A dead host that owes us nothing is found after half a minute; a dead process is found by EOF.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


def tune(sock: socket.socket) -> None:
    """The options that every control connection has, on both sides."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, seconds)


class Peer:
    """The other end of one connection; owns the socket until `close`."""

    def __init__(self, sock: socket.socket, reader: FrameReader, now: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.reader = reader
        self.since = now
        self.heard = now
        self.member: Member | None = None
        self.met_at = ""  # this end's address, as the peer has reached it
        self.nonce = ""
        self.proof: str | None = None
        self.armed = False
        self.said_bye = False
        self.progress: Message = {}
        self.queues: dict[str, deque[tuple[Message, int]]] = {}
        self.num_received = 0
        self.num_unread = 0
        self.unread_nbytes = 0
        self.overrun = False
        self._unsent: deque[memoryview] = deque()
        self._num_unsent = 0
        self._cannot_send = False

    @property
    def label(self) -> str:
        """By rank and host where the peer has said so, else by address."""
        if self.member is not None:
            return self.member.label
        try:
            return f"a peer at {self.sock.getpeername()[0]}"
        except OSError:
            return "a peer"

    @property
    def is_open(self) -> bool:
        return self.sock.fileno() >= 0

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent) and not self._cannot_send

    @property
    def all_arrived(self) -> bool:
        """Whether the peer's host has acknowledged every byte, or never will."""
        if self._cannot_send or not self.is_open:
            return True
        if self._unsent:
            return False
        try:
            packed = fcntl.ioctl(self.sock, termios.TIOCOUTQ, b"\0" * 4)
        except OSError:
            return True
        return int(struct.unpack("i", packed)[0]) == 0

    def queue(self, frame: bytes) -> None:
        """Have the frame sent as soon as the socket takes it; sets `overrun` if too many wait."""
        if self._num_unsent + len(frame) > MAX_UNSENT_NBYTES:
            self.overrun = True
            return
        self._unsent.append(memoryview(frame))
        self._num_unsent += len(frame)

    def flush(self) -> None:
        """Send what the socket takes now, within reason."""
        allowance = SEND_NBYTES
        while self._unsent and allowance > 0 and not self._cannot_send:
            try:
                sent = self.sock.send(self._unsent[0][:allowance])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                # Not yet a death: the peer may have said why before it closed. Reading decides.
                self._cannot_send = True
                self._unsent.clear()
                self._num_unsent = 0
                return
            allowance -= sent
            self._num_unsent -= sent
            if sent == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][sent:]

    def receive(self) -> bool:
        """Take in what has come; False at the end of the connection, orderly or not."""
        try:
            data = self.sock.recv(RECEIVE_NBYTES)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        self.reader.feed(data)
        self.num_received += len(data)
        return bool(data)

    def discard_received(self) -> None:
        """Drop what has come: closing over unread bytes would reset the connection."""
        with contextlib.suppress(OSError):
            for _ in range(16):  # whoever floods us must not keep us here
                if not self.sock.recv(RECEIVE_NBYTES):
                    return

    def store(self, kind: str, message: Message) -> None:
        """Keep the message for whoever waits for its kind; raises if nobody fetches them."""
        nbytes = self.reader.message_nbytes
        limits = self.reader.limits
        allowed = 2 * max(limits.most, *limits.larger.values())
        if self.num_unread >= MAX_UNREAD_MESSAGES or self.unread_nbytes + nbytes > allowed:
            raise WireError("sent more messages than anybody waits for")
        self.queues.setdefault(kind, deque()).append((message, nbytes))
        self.num_unread += 1
        self.unread_nbytes += nbytes

    def has(self, kind: str) -> bool:
        return bool(self.queues.get(kind))

    def take(self, kind: str) -> Message:
        """The oldest message of this kind; there must be one."""
        message, nbytes = self.queues[kind].popleft()
        self.num_unread -= 1
        self.unread_nbytes -= nbytes
        return message

    def close(self) -> None:
        self._unsent.clear()
        self.sock.close()
