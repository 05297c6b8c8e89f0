"""The partial directory as one sink has it open: who owns it, its folders and files, its end.

Knows directories by descriptor; writes no content.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress

from packcast.checkpoint.outgoing import FileSpec
from packcast.io.sinks.attributes import take_over_attributes
from packcast.io.sinks.ownership import folder_open, open_folder
from packcast.io.sinks.partial import is_there, remove_partial
from packcast.io.sinks.publish import publish, seal, sync_folder, sync_parents_of
from packcast.io.sinks.record import check_in_use, claim, in_the_way, nonce_of
from packcast.io.sinks.sharing import remove_after_owner
from packcast.io.sinks.target import Target, destination_error, make_parents

FILE_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_HOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WAIT_FOR_WRITERS_S = 1.0
_MAX_ATTEMPTS = 8


class OpenPartial:
    """A partial directory, which the sink that makes it owns; others may write into its files.

    `folders` are those of the copy with their modes. `while_wanted` is entered for each step that
    creates something: it raises once the sink is aborted, so that nothing appears behind the back
    of a removal. Warnings are added to `notes`.
    """

    def __init__(
        self,
        target: Target,
        folders: dict[str, int],
        while_wanted: Callable[[], AbstractContextManager[None]],
        notes: list[str],
    ) -> None:
        self.target = target
        self.is_owner = False
        self.copy_id: str | None = None  # the same for all sinks of one partial directory alone
        self.fd = -1
        self._folders = folders
        self._while_wanted = while_wanted
        self._notes = notes
        self._made_parents: list[str] = []
        self._holder_fd = self._claim_fd = -1

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode, where this sink may write into it."""
        if self.fd < 0:
            return None
        there = os.fstat(self.fd)
        return there.st_dev, there.st_ino

    def make(self) -> None:
        """Make it and the parents of the target; not the owner if another sink of this transfer
        made it first."""
        target = self.target
        make_parents(target.holder, self._made_parents, self._while_wanted)
        with self._while_wanted():
            self._holder_fd = os.open(target.holder, _HOLDER_FLAGS)
            self.is_owner = self._make_or_find()
            if not self.is_owner:
                self._open_others()
                return
            self.fd = open_folder(self._holder_fd, target.partial)
            try:
                self._claim_fd = claim(self.fd)
                self.copy_id = nonce_of(self._claim_fd)
            except OSError as error:
                raise destination_error(error, f"write into {target.holder}") from error
            if target.mode is not None:
                self._notes += take_over_attributes(target.path, self.fd)

    def _make_or_find(self) -> bool:
        """Whether this sink made it; else another sink of this transfer holds it."""
        target = self.target
        for _ in range(_MAX_ATTEMPTS):
            try:
                os.mkdir(target.partial, self._folders[""], dir_fd=self._holder_fd)
                return True
            except FileExistsError:
                pass
            except OSError as error:
                raise destination_error(error, f"write into {target.holder}") from error
            with suppress(FileNotFoundError):  # its owner has just failed, and removed it
                self.copy_id = check_in_use(self._holder_fd, target.partial, target.partial_path)
                return False
        raise in_the_way(target.partial_path)

    def _open_others(self) -> None:
        """To write into it, where that is this user's."""
        with suppress(OSError):
            self.fd = open_folder(self._holder_fd, self.target.partial)
        if self.fd < 0 or os.fstat(self.fd).st_uid != os.geteuid():
            self.close()

    def make_folders(self) -> None:
        """The folders of the copy."""
        for folder, mode in self._folders.items():
            if not folder:
                continue  # the partial directory itself
            above, _, last = folder.rpartition("/")
            with self._while_wanted(), folder_open(self.fd, above) as above_fd:
                os.mkdir(last, mode, dir_fd=above_fd)

    def open_file(self, spec: FileSpec, flags: int = FILE_FLAGS) -> int:
        """A descriptor of the file."""
        folder, _, last = spec.name.rpartition("/")
        # With its final mode from the start, so that no other user can open it.
        mode = spec.mode | stat.S_IRUSR | stat.S_IWUSR
        with folder_open(self.fd, folder) as folder_fd:
            return os.open(last, flags, mode, dir_fd=folder_fd)

    def sync_folders(self) -> None:
        """Bottom up, so that a durable name never leads to one that is not."""
        for folder in reversed(self._folders):
            sync_folder(self.fd, folder)

    def publish(self, names: Collection[str], *, force: bool) -> None:
        """Give the complete copy its final name; see `publish.publish` for what is raised."""
        claim_fd, self._claim_fd = self._claim_fd, -1
        seal(self.target, self.fd, claim_fd)
        self._notes += publish(self.target, self._holder_fd, names, force=force)
        sync_parents_of(self._made_parents, self.target)

    def remove(self, wait_closed: Callable[[float], object], *, is_shared: bool) -> None:
        """Remove what was made; `wait_closed` waits until the files are closed."""
        holder_fd, name = self._holder_fd, self.target.partial
        if self.is_owner and holder_fd >= 0:
            remove_partial(holder_fd, name)
            # NFS keeps a removed file's name for as long as we have it open: wait for the writers.
            if is_there(holder_fd, name):
                wait_closed(_WAIT_FOR_WRITERS_S)
                self._release_claim()
                remove_partial(holder_fd, name)
        elif is_shared and holder_fd >= 0:
            wait_closed(_WAIT_FOR_WRITERS_S)
            remove_after_owner(holder_fd, self.target.partial_path)
        for folder in reversed(self._made_parents):
            with suppress(OSError):
                os.rmdir(folder)

    def close(self) -> None:
        """Close the descriptors; any number of times."""
        self._release_claim()
        for fd in (self._holder_fd, self.fd):
            if fd >= 0:
                os.close(fd)
        self._holder_fd = self.fd = -1

    def _release_claim(self) -> None:
        if self._claim_fd >= 0:
            os.close(self._claim_fd)
        self._claim_fd = -1
