"""The sink that writes a partial directory, which becomes the target in one step or is removed.

Knows files and threads only.
"""

from __future__ import annotations

import enum
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

from packcast.checkpoint.outgoing import FileSpec
from packcast.errors import DestinationError, PackcastError, TransferError
from packcast.io.files import FileTable
from packcast.io.landing import Sink
from packcast.io.schedule import Schedule, Span
from packcast.io.sinks.attributes import take_over_attributes
from packcast.io.sinks.ownership import folder_open, mark_as_own, open_folder
from packcast.io.sinks.partial import is_there, remove_partial
from packcast.io.sinks.publish import NotDurable, publish, seal, sync_folder, sync_parents_of
from packcast.io.sinks.record import check_in_use, claim, nonce_of
from packcast.io.sinks.sharing import ALONE, Share, remove_after_owner
from packcast.io.sinks.space import free_nbytes, reserve
from packcast.io.sinks.target import (
    Target,
    check_names,
    check_replaceable,
    clear_leftovers,
    destination_error,
    folder_modes,
    locate,
    make_parents,
)
from packcast.io.work import Failure, Task
from packcast.packed.counters import Stage
from packcast.packed.plan import Extent

_NUM_SYNC_THREADS = 8
_WAIT_FOR_WRITERS_S = 1.0
_HOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        self._folders = folder_modes(self._files)
        self._transfer_id = transfer_id
        self._force = force
        self._in_place = in_place
        self.wrote = False
        self.published = False
        self.copy_id: str | None = None  # the same for all sinks of one partial directory alone
        self._share = ALONE
        self._target: Target | None = None
        self._made_parents: list[str] = []
        self._holder_fd = self._partial_fd = self._claim_fd = -1
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
            self._target = target
            self.notes += clear_leftovers(target)
            check_replaceable(target, self._names, force=self._force)
            make_parents(target.holder, self._made_parents, self._while_wanted)
            if not self._make_partial(target):
                return
            free = free_nbytes(self._partial_fd)
            self._make_folders()
            for index in range(len(self._files)):
                self._make_file(index)
            self.notes += reserve(self._table, self._files, target, free)
            self._raise_if_aborted()

    @property
    def partial_identity(self) -> tuple[int, int] | None:
        """Device and inode of the partial directory, where this sink may write into it."""
        if self._partial_fd < 0:
            return None
        there = os.fstat(self._partial_fd)
        return there.st_dev, there.st_ino

    def take_share(self, share: Share) -> None:
        """Write this share of the copy, while the owner and others write theirs; after `prepare`,
        of all who share, that is once the files are there. Without it the owner writes all."""
        self._share = share
        if not self._writes:
            with self._step("write"):
                self._close_folders()

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
            if not self.wrote:
                self._table.close()
                self._close_folders()
                return
            target = self._located()
            try:
                if self._share.count > 1:
                    self._finish_shared(target)
                self._table.close()
                claim_fd, self._claim_fd = self._claim_fd, -1
                seal(target, self._partial_fd, claim_fd)
                self.notes += publish(target, self._holder_fd, self._names, force=self._force)
                self.published = True
                sync_parents_of(self._made_parents, target)
            except NotDurable:
                self.published = True
                raise
            finally:
                self._close_folders()

    def left(self) -> str | None:
        """The partial directory, if it is still there."""
        path = self._target.partial_path if self._target and self.wrote else ""
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
            with self._removal_lock:
                self._remove()
                # A step that is under way still uses them, and comes here when it ends.
                if self._step_lock.acquire(blocking=False):
                    try:
                        self._close_folders()
                    finally:
                        self._step_lock.release()

    def result(self) -> dict[str, object]:
        target = self._target
        return {
            "sink": "write",
            "target": target.path if target else os.path.abspath(self._given),
            "wrote": self.wrote,
            "published": self.published,
            "sharing": self._share.count,
            "notes": list(self.notes),
        }

    # -- making ----------------------------------------------------------------------------------

    def _make_partial(self, target: Target) -> bool:
        """Make the partial directory; False if another sink of this transfer made it first."""
        with self._while_wanted():
            self._holder_fd = os.open(target.holder, _HOLDER_FLAGS)
            try:
                os.mkdir(target.partial, self._folders[""], dir_fd=self._holder_fd)
            except FileExistsError:
                self.copy_id = check_in_use(self._holder_fd, target.partial, target.partial_path)
                self._open_others_partial(target)
                return False
            except OSError as error:
                raise destination_error(error, f"write into {target.holder}") from error
            self.wrote = True
            self._partial_fd = open_folder(self._holder_fd, target.partial)
            try:
                self._claim_fd = claim(self._partial_fd)
                self.copy_id = nonce_of(self._claim_fd)
            except OSError as error:
                raise destination_error(error, f"write into {target.holder}") from error
            if target.mode is not None:
                self.notes += take_over_attributes(target.path, self._partial_fd)
        return True

    def _open_others_partial(self, target: Target) -> None:
        """To write into it, where that is this user's; until `take_share` says otherwise."""
        with suppress(OSError):
            self._partial_fd = open_folder(self._holder_fd, target.partial)
        if self._partial_fd < 0 or os.fstat(self._partial_fd).st_uid != os.geteuid():
            self._close_folders()

    def _make_folders(self) -> None:
        for folder, mode in self._folders.items():
            if not folder:
                continue  # the partial directory itself
            above, _, last = folder.rpartition("/")
            with self._while_wanted(), folder_open(self._partial_fd, above) as above_fd:
                os.mkdir(last, mode, dir_fd=above_fd)

    def _make_file(self, index: int) -> None:
        with self._while_wanted():
            try:
                fd = self._open(index, _FILE_FLAGS | os.O_CREAT | os.O_EXCL)
            except OSError as error:
                raise destination_error(error, f"make {self._path_of(index)}") from error
            self._table.adopt(index, fd)
            self._table.release(index)

    # -- finishing and removing ------------------------------------------------------------------

    def _finish_files(self, *, is_last: bool) -> None:
        """Make what was written durable; `is_last`: nobody will write any more."""
        indices = [
            index
            for index, spec in enumerate(self._files)
            if is_last or self._share.has_part_of(index, spec.nbytes)
        ]
        with ThreadPoolExecutor(_NUM_SYNC_THREADS, "packcast-sync") as pool:
            list(pool.map(partial(self._finish_file, is_last=is_last), indices))
        if is_last:
            # Bottom up, so that a durable name never leads to one that is not.
            for folder in reversed(self._folders):
                sync_folder(self._partial_fd, folder)

    def _finish_shared(self, target: Target) -> None:
        """What cannot be finished now is no copy: nobody else would remove it after COMMIT."""
        try:
            self._finish_files(is_last=True)
        except BaseException as error:
            self._table.close()
            with self._removal_lock:
                self._remove()
            if isinstance(error, OSError):
                raise destination_error(error, f"publish {target.path}") from error
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

    def _remove(self) -> None:
        if self.wrote and self._holder_fd >= 0:
            partial = self._located().partial
            remove_partial(self._holder_fd, partial)
            # NFS keeps a removed file's name for as long as we have it open: wait for the writers.
            if is_there(self._holder_fd, partial):
                self._table.wait_closed(_WAIT_FOR_WRITERS_S)
                self._release_claim()
                remove_partial(self._holder_fd, partial)
        elif self._share.count > 1 and self._holder_fd >= 0:
            self._table.wait_closed(_WAIT_FOR_WRITERS_S)
            remove_after_owner(self._holder_fd, self._located().partial_path)
        for folder in reversed(self._made_parents):
            with suppress(OSError):
                os.rmdir(folder)

    def _release_claim(self) -> None:
        if self._claim_fd >= 0:
            os.close(self._claim_fd)
        self._claim_fd = -1

    def _close_folders(self) -> None:
        self._release_claim()
        for fd in (self._holder_fd, self._partial_fd):
            if fd >= 0:
                os.close(fd)
        self._holder_fd = self._partial_fd = -1

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

    def _located(self) -> Target:
        assert self._target is not None
        return self._target

    def _path_of(self, index: int) -> str:
        return os.path.join(self._located().path, self._files[index].name)

    def _open(self, index: int, flags: int) -> int:
        spec = self._files[index]
        folder, _, last = spec.name.rpartition("/")
        # With its final mode from the start, so that no other user can open it.
        mode = spec.mode | stat.S_IRUSR | stat.S_IWUSR
        with folder_open(self._partial_fd, folder) as folder_fd:
            return os.open(last, flags, mode, dir_fd=folder_fd)

    def _reopen(self, index: int) -> int:
        self._raise_if_aborted()
        try:
            return self._open(index, _FILE_FLAGS)
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
