"""The sink that writes a partial directory, which becomes the target in one step or is removed.

Knows files and threads only.
"""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import DestinationError, PackcastError, TransferError
from packcast.io.files import FileTable
from packcast.io.landing import Sink
from packcast.io.schedule import Schedule, Span
from packcast.io.sinks.open_partial import FILE_FLAGS, OpenPartial
from packcast.io.sinks.ownership import mark_as_own
from packcast.io.sinks.publish import NotDurable
from packcast.io.sinks.sharing import ALONE, Share
from packcast.io.sinks.space import free_nbytes, reserve
from packcast.io.sinks.target import (
    check_names,
    check_replaceable,
    clear_leftovers,
    destination_error,
    folder_modes,
    locate,
)
from packcast.io.work import Failure, Task
from packcast.packed.counters import Stage
from packcast.packed.plan import Extent

_NUM_SYNC_THREADS = 8


class _State(enum.Enum):
    WRITING = enum.auto()
    ABORTED = enum.auto()
    COMMITTED = enum.auto()  # publish was called: abort comes too late


class WriteSink(Sink):
    """Writes the offered files into `target`, a directory, which appears complete or not at all.

    Calls, in order: prepare, take_share, spans and open_files, finish, publish, from one thread.
    abort from any thread, at any time; later writes of I/O threads are lost. Where several sinks of
    one transfer name the same directory, one owns it (`wrote`); the others write a share of it, if
    they are given one, else they drop their bytes. All raise DestinationError for a failed system
    call, and TransferError after an abort.
    """

    stage: ClassVar[Stage] = "write"
    task = Task.WRITE

    def __init__(
        self,
        target: Path,
        files: Sequence[FileSpec],
        *,
        transfer_id: str,
        force: bool,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self._given = target
        self._files = tuple(files)
        self._names = frozenset(spec.name for spec in self._files)
        self._transfer_id = transfer_id
        self._force = force
        self._in_place = in_place
        self.published = False
        self._share = ALONE
        self._partial: OpenPartial | None = None
        self._table = FileTable(len(self._files), self._reopen, self._close, keeps_open=True)
        self._state = _State.WRITING
        # Three locks, taken in this order: a step of the main thread; the removal; the state.
        # Things are created only under the last, with the state looked at, so that nothing appears
        # behind the back of a removal. Re-entrant, since a failing step aborts.
        self._step_lock = threading.RLock()
        self._removal_lock = threading.RLock()
        self._lock = threading.RLock()

    # -- the three steps, in order ---------------------------------------------------------------

    def prepare(self) -> None:
        """Check the target, make the partial directory and reserve every file's space in it."""
        with self._step("write"):
            check_names([spec.name for spec in self._files], self._transfer_id)
            target = locate(self._given, self._transfer_id, in_place=self._in_place)
            self.notes += clear_leftovers(target)
            check_replaceable(target, self._names, force=self._force)
            folders = folder_modes(self._files)
            self._partial = OpenPartial(target, folders, self._while_wanted, self.notes)
            self._partial.make()
            if not self.wrote:
                return
            free = free_nbytes(self._partial.fd)
            self._partial.make_folders()
            for index in range(len(self._files)):
                self._make_file(index)
            self.notes += reserve(self._table, self._files, target, free)
            self._raise_if_aborted()

    @property
    def wrote(self) -> bool:
        """Whether this sink owns the partial directory."""
        return self._partial is not None and self._partial.is_owner

    @property
    def copy_id(self) -> str | None:
        """The same for all sinks of one partial directory, and for no others."""
        return self._partial.copy_id if self._partial else None

    @property
    def partial_identity(self) -> tuple[int, int] | None:
        """Device and inode of the partial directory, where this sink may write into it."""
        return self._partial.identity if self._partial else None

    def take_share(self, share: Share) -> None:
        """Write this share of the copy, while the owner and others write theirs; after `prepare`,
        of all who share, that is once the files are there. Without it the owner writes all."""
        self._share = share
        if not self._writes:
            with self._step("write"):
                self._located().close()

    @property
    def _writes(self) -> bool:
        return self.wrote or self._share.count > 1

    def spans(self, extent: Extent) -> Iterable[Span]:
        """Where to write the extent's bytes; empty if other sinks write them."""
        return self._share.spans(extent) if self._writes else ()

    def open_files(self, schedule: Schedule) -> FileTable:
        """The files, for I/O threads; the last of them are closed at the end of all."""
        return self._table

    def error_of(self, failure: Failure, span: Span) -> PackcastError:
        """What kept a span from being written."""
        error = OSError(failure.errno, failure.reason)
        return destination_error(error, f"write {self._path_of(span.file)}")

    def finish(self) -> None:
        """After the last extent: make files and folders durable, with their times.

        Where others write too they may go on after that, so the times follow in `publish`.
        """
        if not self._writes:
            return
        with self._step("finish"):
            self._finish_files(is_last=self._share.count == 1)
            self._raise_if_aborted()

    def publish(self) -> None:
        """Give the complete copy its final name; of several sinks, once all have finished, the
        owner does. From here on abort does nothing."""
        with self._step_lock:
            with self._lock:
                self._raise_if_aborted()
                if self._state is _State.COMMITTED:
                    return
                self._state = _State.COMMITTED
            partial = self._located()
            try:
                if self.wrote and self._share.count > 1:
                    self._finish_shared(partial)
                self._table.close()
                if self.wrote:
                    partial.publish(self._names, force=self._force)
                    self.published = True
            except NotDurable:
                self.published = True
                raise
            finally:
                partial.close()

    def left(self) -> str | None:
        """The partial directory, if it is still there."""
        path = self._partial.target.partial_path if self._partial and self.wrote else ""
        return path if os.path.lexists(path) else None

    def abort(self) -> None:
        """Stop, and remove what was made; any thread, any number of times, never raises.

        Returns when it is gone. Does nothing after publish was called.
        """
        with suppress(Exception):
            with self._lock:
                if self._state is _State.COMMITTED:
                    return
                self._state = _State.ABORTED
            self._table.close()
            if self._partial is None:
                return
            with self._removal_lock:
                self._remove(self._partial)
                # A step that is under way still uses them, and comes here when it ends.
                if self._step_lock.acquire(blocking=False):
                    try:
                        self._partial.close()
                    finally:
                        self._step_lock.release()

    def result(self) -> dict[str, object]:
        partial = self._partial
        return {
            "sink": "write",
            "target": partial.target.path if partial else os.path.abspath(self._given),
            "wrote": self.wrote,
            "published": self.published,
            "sharing": self._share.count,
            "notes": list(self.notes),
        }

    # -- making, finishing and removing ----------------------------------------------------------

    def _make_file(self, index: int) -> None:
        with self._while_wanted():
            try:
                new = FILE_FLAGS | os.O_CREAT | os.O_EXCL
                fd = self._located().open_file(self._files[index], new)
            except OSError as error:
                raise destination_error(error, f"make {self._path_of(index)}") from error
            self._table.adopt(index, fd)
            self._table.release(index)

    def _finish_files(self, *, is_last: bool) -> None:
        """Make what was written durable; `is_last`: all writing has ended."""
        indices = [
            index
            for index, spec in enumerate(self._files)
            if is_last or self._share.has_part_of(index, spec.nbytes)
        ]
        with ThreadPoolExecutor(_NUM_SYNC_THREADS, "packcast-sync") as pool:
            list(pool.map(lambda index: self._finish_file(index, is_last=is_last), indices))
        if is_last:
            self._located().sync_folders()

    def _finish_shared(self, partial: OpenPartial) -> None:
        """Remove a copy that cannot be finished: after COMMIT no other rank would."""
        try:
            self._finish_files(is_last=True)
        except BaseException as error:
            self._table.close()
            with self._removal_lock:
                self._remove(partial)
            if isinstance(error, OSError):
                raise destination_error(error, f"publish {partial.target.path}") from error
            raise

    def _finish_file(self, index: int, *, is_last: bool) -> None:
        spec = self._files[index]
        try:
            with self._table.borrow(index) as fd:
                if is_last:
                    if os.fstat(fd).st_size != spec.nbytes:
                        where = self._path_of(index)
                        raise DestinationError(f"{where} was changed by another process")
                    # Times that a file system or libc cannot hold are not worth a failure.
                    with suppress(OSError, OverflowError):
                        os.utime(fd, ns=(spec.mtime_ns, spec.mtime_ns))
                    mark_as_own(fd, self._transfer_id)
                os.fsync(fd)
        except OSError as error:
            raise destination_error(error, f"write {self._path_of(index)}") from error

    def _remove(self, partial: OpenPartial) -> None:
        partial.remove(self._table.wait_closed, is_shared=self._share.count > 1)

    # -- small things ----------------------------------------------------------------------------

    @contextmanager
    def _step(self, doing: str) -> Iterator[None]:
        """One step of the main thread: what fails in it cleans up, an abort ends it."""
        with self._step_lock:
            try:
                self._raise_if_aborted()
                yield
            except BaseException as error:
                was_aborted = self._state is _State.ABORTED
                self.abort()
                # A failure after the abort only follows from it.
                if was_aborted and isinstance(error, Exception):
                    raise _aborted() from None
                if isinstance(error, OSError):
                    raise destination_error(error, f"{doing} {self._given}") from error
                raise
            finally:
                if self._state is _State.ABORTED:
                    self.abort()

    @contextmanager
    def _while_wanted(self) -> Iterator[None]:
        with self._lock:
            self._raise_if_aborted()
            yield

    def _raise_if_aborted(self) -> None:
        if self._state is _State.ABORTED:
            raise _aborted()

    def _located(self) -> OpenPartial:
        assert self._partial is not None
        return self._partial

    def _path_of(self, index: int) -> str:
        return os.path.join(self._located().target.path, self._files[index].name)

    def _reopen(self, index: int) -> int:
        self._raise_if_aborted()
        try:
            return self._located().open_file(self._files[index])
        except OSError as error:
            raise destination_error(error, f"write {self._path_of(index)}") from error

    def _close(self, index: int, fd: int) -> None:
        # A network file system may write only now, and reports an error once.
        try:
            os.close(fd)
        except OSError as error:
            raise destination_error(error, f"write {self._path_of(index)}") from error


def _aborted() -> TransferError:
    return TransferError("the transfer was aborted")
