"""Several ranks of one host write one copy: which bytes are whose, and what a helper leaves behind.

The rank that made the partial directory owns it: it alone publishes or removes it. The others, its
helpers, only write into its files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from packcast.io.schedule import Span
from packcast.io.sinks.partial import Partial, is_there, remove_if_unused
from packcast.packed.plan import TURN, Extent

_LOOK_S = 0.02
# From the end of a process, which closes its connections, to the end of its locks.
_REMOVAL_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Share:
    """Every `count`th run of TURN bytes, from the one numbered `index` on, the owner's being 0."""

    index: int
    count: int

    def spans(self, extent: Extent) -> Iterator[Span]:
        """What of the extent is to be written. Files take turns, or one that is first in several
        would be always the same rank's."""
        if self.count == 1:
            yield Span(extent.file, extent.offset, 0, extent.nbytes)
            return
        offset, end = extent.offset, extent.offset + extent.nbytes
        while offset < end:
            number = offset // TURN
            stop = min(end, (number + 1) * TURN)
            if (extent.file + number) % self.count == self.index:
                yield Span(extent.file, offset, offset - extent.offset, stop - offset)
            offset = stop

    def has_part_of(self, file: int, nbytes: int) -> bool:
        """Whether this share has a byte of a file of `nbytes`."""
        return (self.index - file) % self.count < -(-nbytes // TURN)


ALONE = Share(0, 1)


def remove_after_owner(holder_fd: int, path: str) -> None:
    """Wait until the owner has removed its partial directory; where it was killed, remove it.

    Its record proves that: one that lives, or has published, holds the lock or has no record.
    """
    deadline = time.monotonic() + _REMOVAL_LIMIT_S
    while is_there(holder_fd, os.path.basename(path)):
        if remove_if_unused(Partial(path, "used", None, 0)) or time.monotonic() > deadline:
            return
        time.sleep(_LOOK_S)
