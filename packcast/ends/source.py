"""The producer's end: threads read outgoing files piece by piece, ahead of the loop, into staging.

Reads by `preadv`, never by mapping: a file that is cut short while it is read is then an error,
not the death of the process. Digests are taken while a piece is still in the cache.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from queue import SimpleQueue

from packcast.checkpoint.checkpoint import SourceFile
from packcast.checkpoint.outgoing import Literal, OutgoingFile
from packcast.ends.digests import BlockDigests, block_digests
from packcast.ends.staging import CLOSE_LIMIT_S, Buffers, Lease, join_all, make_staging, use_device
from packcast.errors import CheckpointError, PackcastError, TransferError, as_packcast_error
from packcast.packed.plan import Chunk, Piece, piece_nbytes, pieces_of
from packcast.packed.ring import Slot
from packcast.packed.trailer import write_trailer


class FileReader:
    """Reads any run of an outgoing file's bytes, from many threads; each file is open once."""

    def __init__(self, files: Sequence[OutgoingFile], sources: Sequence[SourceFile]) -> None:
        self._files = files
        self._sources = sources
        self._begins = [  # of each file's segments, to find the one a byte is in
            list(accumulate((segment.nbytes for segment in file.segments), initial=0))
            for file in files
        ]
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}  # source -> file descriptor

    @property
    def file_nbytes(self) -> list[int]:
        """The sizes of the outgoing files."""
        return [file.spec.nbytes for file in self._files]

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Fill `into` with the outgoing file's bytes from `offset`."""
        begins, segments = self._begins[file], self._files[file].segments
        i = bisect_right(begins, offset) - 1
        while into:
            segment, skip = segments[i], offset - begins[i]
            part, into = into[: segment.nbytes - skip], into[segment.nbytes - skip :]
            if isinstance(segment, Literal):
                part[:] = segment.data[skip : skip + len(part)]
            else:
                self._read_source(segment.source, segment.offset + skip, part)
            offset, i = offset + len(part), i + 1

    def close_file(self, file: int) -> None:
        """Every byte of the outgoing file was read: see that its sources have not changed."""
        for source in {s.source for s in self._files[file].segments if not isinstance(s, Literal)}:
            with self._lock:
                descriptor = self._open.pop(source, None)
            if descriptor is not None:
                try:
                    self._check_unchanged(source, descriptor)
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Close what is still open, unchecked; no read may be under way."""
        with self._lock:
            descriptors = list(self._open.values())
            self._open.clear()
        for descriptor in descriptors:
            os.close(descriptor)

    def _read_source(self, source: int, offset: int, into: memoryview) -> None:
        descriptor = self._descriptor(source)
        while into:
            try:
                got = os.preadv(descriptor, [into], offset)
            except OSError as error:
                name = self._sources[source].name
                raise CheckpointError(f"{name}: reading failed: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(
                    f"{self._sources[source].name} ended at byte {offset} while it was being sent"
                )
            into, offset = into[got:], offset + got

    def _descriptor(self, source: int) -> int:
        with self._lock:
            descriptor = self._open.get(source)
            if descriptor is None:
                try:
                    descriptor = os.open(self._sources[source].path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    name = self._sources[source].name
                    raise CheckpointError(f"{name}: cannot be opened: {error.strerror}") from error
                self._open[source] = descriptor
                self._check_unchanged(source, descriptor)
            return descriptor

    def _check_unchanged(self, source: int, descriptor: int) -> None:
        known, now = self._sources[source], os.fstat(descriptor)
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (
            known.nbytes,
            known.mtime_ns,
            known.inode,
        ):
            raise CheckpointError(
                f"{known.name} changed while it was being sent",
                hint="nothing was published; run again once it is quiet",
            )


class _Load:
    """One piece on its way from file to slot."""

    __slots__ = ("digests", "error", "lease", "piece", "ready")

    def __init__(self, piece: Piece, lease: Lease) -> None:
        self.piece = piece
        self.lease = lease
        self.digests = b""
        self.error: PackcastError | None = None
        self.ready = threading.Event()


class FileSource:
    """Fills slots from outgoing files.

    Beside a GPU `staging_nbytes` bounds how far it reads ahead; on a CPU the ring does.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        reader: FileReader,
        buffers: Buffers,
        *,
        num_threads: int,
    ) -> None:
        self.digests = BlockDigests(reader.file_nbytes)
        self._reader = reader
        self._ring = buffers.ring
        self._counters = buffers.ring.counters
        self._tag = buffers.tag
        self._piece_nbytes = piece_nbytes(buffers.buffer_size)
        self._staging, self._trailers = make_staging(buffers)
        self._unread: dict[int, int] = {}
        for chunk in chunks:
            for extent in chunk.extents:
                self._unread[extent.file] = self._unread.get(extent.file, 0) + extent.nbytes
        self._unread_lock = threading.Lock()
        self._next = self._loads_ahead(chunks)
        self._next_lock = threading.Lock()
        self._loads: SimpleQueue[_Load | PackcastError] = SimpleQueue()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._read, name=f"packcast-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pinned_nbytes(self) -> int:
        """Pinned memory that this end holds."""
        return self._staging.pinned_nbytes + self._trailers.pinned_nbytes

    def fill(self, chunk: Chunk, slot: Slot) -> None:
        """Give the chunk and its trailer to the fill lane, each piece as soon as it was read."""
        ring, digests = self._ring, bytearray()
        with ring.fill:
            begin = ring.fill.mark()
            filled = 0
            while filled < chunk.nbytes:
                load = self._await_load()
                filled += load.piece.nbytes
                load.lease.copy_to(slot, load.piece.slot_offset)
                load.lease.release(ring.fill.mark())
                digests += load.digests
                self._counters.newest = load.piece.extents[-1]
            offset = chunk.trailer_offset
            trailer = self._trailers.lease(chunk, offset, chunk.trailer_nbytes)
            write_trailer(trailer.view, self._tag, chunk, bytes(digests))
            trailer.copy_to(slot, offset)
            slot.filled = ring.fill.mark()
            trailer.release(slot.filled)
        if not ring.is_host:
            ring.clock.span("h2d", chunk.index, chunk.nbytes, begin, slot.filled)

    def close(self) -> None:
        """End the threads and close the files."""
        self._stopped = True
        over = TransferError("the transfer is over")
        self._staging.close(over)
        self._trailers.close(over)
        if join_all(self._threads, CLOSE_LIMIT_S):
            self._reader.close()

    def _await_load(self) -> _Load:
        # No piece has been begun: beside a GPU staging is full of what waits for its copy.
        with self._counters.waiting_on("read" if self._ring.is_host else "h2d"):
            load = self._loads.get()
        if isinstance(load, PackcastError):
            raise load
        with self._counters.waiting_on("read"):
            load.ready.wait()
        if load.error is not None:
            raise load.error
        return load

    def _loads_ahead(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, _Load]]:
        for chunk in chunks:
            for piece in pieces_of(chunk, self._piece_nbytes):
                lease = self._staging.lease(chunk, piece.slot_offset, piece.nbytes)
                yield chunk, _Load(piece, lease)

    def _read(self) -> None:
        while not self._stopped:
            try:
                use_device(self._ring.device)
                # Staging is lent under the lock, in chunk order: were it lent out of order, later
                # pieces could hold all of it while the loop waits for an earlier one.
                with self._next_lock:
                    entry = next(self._next, None)
                    if entry is None:
                        return
                    chunk, load = entry
                    self._loads.put(load)
            except Exception as error:
                self._loads.put(as_packcast_error(error, "reading"))
                return
            self._read_piece(chunk, load)

    def _read_piece(self, chunk: Chunk, load: _Load) -> None:
        begin = time.perf_counter()
        try:
            found, view = [], load.lease.view
            for extent in load.piece.extents:
                part, view = view[: extent.nbytes], view[extent.nbytes :]
                self._reader.read(extent.file, extent.offset, part)
                found.append(block_digests(part))
                self.digests.record(extent, found[-1])
                self._count_off(extent.file, extent.nbytes)
            load.digests = b"".join(found)
        except Exception as error:
            load.error = as_packcast_error(error, "reading")
        finally:
            self._counters.add("read", chunk.index, load.piece.nbytes, begin, time.perf_counter())
            load.ready.set()

    def _count_off(self, file: int, nbytes: int) -> None:
        with self._unread_lock:
            self._unread[file] -= nbytes
            last = self._unread[file] == 0
        if last:
            self._reader.close_file(file)
