"""The control channel's background thread: a selector, posted calls, a regular tick.

It owns all sockets that it watches; other threads only post. Knows nothing of what is said.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable

TICK_S = 0.1

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class ControlLoop:
    """One thread that serves sockets until `stop`; an exception in it ends in `crashed`.

    `tick` runs after every round, at least each TICK_S. `ended` runs last, on the thread.
    """

    def __init__(
        self,
        name: str,
        *,
        tick: Callable[[], None],
        crashed: Callable[[Exception], None],
        ended: Callable[[], None],
    ) -> None:
        self._tick = tick
        self._crashed = crashed
        self._ended = ended
        self._selector = selectors.DefaultSelector()
        # Posts must end a select() at once: a byte on this pair does.
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, READ, self._woken)
        self._lock = threading.Lock()
        self._posted: deque[Callable[[], None]] = deque()
        self._over = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, once."""
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run on the thread, in order of posting; any thread. Dropped at the end."""
        with self._lock:
            if self._over:
                return
            self._posted.append(call)
            with contextlib.suppress(BlockingIOError):  # full of wake-ups: it will wake
                self._wake_out.send(b"\0")

    def is_current(self) -> bool:
        """Whether the caller is the thread itself."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """Leave after this round; on the thread."""
        self._stopping = True

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def watch(self, sock: socket.socket, events: int, on_ready: Callable[[int], None]) -> None:
        """Call `on_ready(events)` when the socket is ready; on the thread, or before its start."""
        self._selector.register(sock, events, on_ready)

    def rewatch(self, sock: socket.socket, events: int) -> None:
        """Change what a watched socket is watched for; on the thread."""
        key = self._selector.get_key(sock)
        if key.events != events:
            self._selector.modify(sock, events, key.data)

    def unwatch(self, sock: socket.socket) -> None:
        """Forget a socket, watched or not; on the thread, before the socket is closed."""
        if sock.fileno() >= 0 and sock in self._selector.get_map():
            self._selector.unregister(sock)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._round()
        except Exception as error:
            self._crashed(error)
        finally:
            with self._lock:
                self._over = True
            self._ended()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()

    def _round(self) -> None:
        for key, events in self._selector.select(TICK_S):
            # An earlier callback of this round may have closed this one's socket.
            watched = self._selector.get_map().get(key.fd)
            if watched is not None and watched.fileobj is key.fileobj:
                key.data(events)
        # Only what was there at first: a call that posts itself again must not starve the sockets.
        for _ in range(len(self._posted)):
            self._posted.popleft()()
        self._tick()

    def _woken(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)
