"""`--log-json FILE`: a JSON object on each line, written as the event happens.

Each has `time` (seconds since 1970) and `event`. Sizes are bytes. The other fields by event:

    phase     phase: load, join, offer, start, data, finish, publish, done
    join      joined, wanted: numbers of workers; missing: ranks; newest: the last one, or null
    start     rank, is_sender, files, tensors, bytes, world_size, readers, backend, device, reason
    progress  done, total, stages: bytes of each; workers: by rank, done and stage. Every 10 s
    warning   text
    note      text
    end       ok, exit_code, error, hint; the last line

Knows no torch.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import FileIO
from pathlib import Path

from packcast.cli.terminal import say
from packcast.errors import PackcastError
from packcast.launch.devices import host_name
from packcast.launch.launchers import Launch
from packcast.settings import fill_in
from packcast.view import Joining, Phase, Snapshot, Start, View

PROGRESS_EVERY_S = 10.0


class JsonLog(View):
    """The log file of one rank. Without {rank} in its name only the sender writes: lines are kept
    until the launch has decided which rank sends.
    """

    def __init__(self, name: str, launch: Launch) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._waiting: list[str] = []
        self._file: FileIO | None = None
        self._is_dropped = False
        self._is_first = launch.rank == 0
        self._path = Path(
            fill_in(name, rank=launch.rank, local_rank=launch.local_rank, host=host_name())
        )
        if "{rank}" in name or launch.kind == "none":
            self._open()

    def placed(self, rank: int, *, is_sender: bool) -> None:
        self._settle(is_mine=is_sender)

    def phase(self, phase: Phase) -> None:
        if phase == "publish":
            self._over.set()
        self._write("phase", phase=phase)

    def joining(self, joining: Joining) -> None:
        self._write(
            "join",
            joined=joining.joined,
            wanted=joining.wanted,
            missing=joining.missing,
            newest=joining.newest,
        )

    def warn(self, text: str) -> None:
        self._write("warning", text=text)

    def note(self, text: str) -> None:
        self._write("note", text=text)

    def started(self, start: Start, progress: Callable[[], Snapshot]) -> None:
        self._settle(is_mine=start.is_sender)
        self._write(
            "start",
            rank=start.rank,
            is_sender=start.is_sender,
            files=start.num_files,
            tensors=start.num_tensors,
            bytes=start.nbytes,
            world_size=start.world_size,
            readers=start.readers,
            backend=start.backend,
            device=start.device,
            reason=start.reason,
        )

        def watch() -> None:
            while not self._over.wait(PROGRESS_EVERY_S):
                self._write_progress(progress())

        threading.Thread(target=watch, name="packcast-log", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def ended(self, error: PackcastError | None) -> None:
        """Write the last line."""
        self._over.set()
        self._settle(is_mine=self._is_first)  # of a run that ended before it was known
        self._write(
            "end",
            ok=error is None,
            exit_code=error.exit_code if error else 0,
            error=error.message if error else None,
            hint=error.hint if error else None,
        )
        with self._lock:
            self._drop()

    def _write_progress(self, snapshot: Snapshot) -> None:
        self._write(
            "progress",
            done=snapshot.nbytes_done,
            total=snapshot.nbytes_total,
            stages=snapshot.stages,
            workers={
                rank: {"done": worker.nbytes, "stage": worker.stage}
                for rank, worker in snapshot.workers.items()
            },
        )

    def _settle(self, *, is_mine: bool) -> None:
        """Decide whether this rank writes, unless that is decided already."""
        with self._lock:
            if self._file is None and not self._is_dropped:
                if is_mine:
                    self._open()
                else:
                    self._drop()

    def _write(self, event: str, **fields: object) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event} | fields) + "\n"
        with self._lock:
            if self._is_dropped:
                return
            self._waiting.append(line)
            if self._file is not None:
                self._flush()

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb", buffering=0)  # or closing it could fail again
        except OSError as error:
            self._give_up(error)
        else:
            self._flush()

    def _flush(self) -> None:
        assert self._file is not None
        try:
            self._file.write("".join(self._waiting).encode())
        except OSError as error:
            self._give_up(error)
        self._waiting.clear()

    def _give_up(self, error: OSError) -> None:
        """A failed write of the log does not fail the transfer."""
        say(f"packcast: warning: --log-json: {self._path}: {error.strerror}; no more is logged")
        self._drop()

    def _drop(self) -> None:
        self._is_dropped = True
        self._waiting.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


class Views(View):
    """Passes every call on to several views."""

    def __init__(self, *views: View) -> None:
        for name in vars(View):
            if not name.startswith("_"):
                setattr(self, name, partial(self._call_all, views, name))

    @staticmethod
    def _call_all(views: Sequence[View], name: str, *args: object, **kwargs: object) -> None:
        for view in views:
            getattr(view, name)(*args, **kwargs)
