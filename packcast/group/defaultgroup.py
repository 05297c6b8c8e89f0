"""torch.distributed's default group, for a while: programs of others ask for it.

It stands beside the group of our own, which is in none of torch's tables; knows nothing of who
uses it.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from packcast.errors import RendezvousError
from packcast.group.bounded import within
from packcast.group.processgroup import (
    NCCL_GROUP_VARIABLES,
    begin_abort,
    environment_with,
    interface_variable,
)
from packcast.units import format_duration

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import ProcessGroup, Store

_LOOK_UP_EVERY_S = 0.25
_PAUSE_S = 0.01
_GRACE_S = 5.0
_THREAD = "packcast-default-group"
_CLOSE_LIMIT_S = 15.0
_GIVEN_UP = "given up"


class Forsaken(RendezvousError):
    """Another rank could not make the group, and has the reason."""


class DefaultGroup:
    """The default group on one rank, from `open_default_group` until `close`.

    Who is in a collective of others' making can be told nothing: so the rank that fails says
    `give_up`, and a thread on every other rank hears it and aborts what NCCL has under way there.
    gloo's collectives end when the rank that failed closes its connections.
    """

    def __init__(
        self, store: Store, device: torch.device, *, rank: int, world_size: int, limit_s: float
    ) -> None:
        self._store = store
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._limit_s = limit_s
        self._is_given_up = False
        self._is_ours = False
        self._aborted: threading.Event | None = None
        self._excepthook = sys.excepthook  # torch puts one of its own there
        self._over = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch, name="packcast-default-group", daemon=True
        )

    @property
    def group(self) -> ProcessGroup:
        """As torch's own functions and others' programs take it."""
        import torch.distributed as dist

        world = dist.group.WORLD
        assert world is not None, "it is there until close"
        return world

    def make(self, backend: Literal["nccl", "gloo"], interface: str | None) -> None:
        """Wait for all ranks, make the group, and have it connected by a first collective."""
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            raise RendezvousError("this process has a default group already")
        if not self._meet("begin"):
            raise RendezvousError(f"not all ranks joined within {format_duration(self._limit_s)}")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own
        self._is_ours = True
        variables = NCCL_GROUP_VARIABLES if backend == "nccl" else {}
        with environment_with(variables | interface_variable(backend, interface)):
            # Not bound to a device: then NCCL's calls would not block, which not all others expect.
            dist.init_process_group(
                backend,
                store=self._store,
                rank=self._rank,
                world_size=self._world_size,
                timeout=timedelta(seconds=self._limit_s),
            )
            count = torch.ones(1, device=self._device)
            dist.all_reduce(count)
        if count.item() != self._world_size:
            raise RendezvousError(f"{count.item():g} of {self._world_size} ranks are in it")
        self._watcher.start()

    def is_given_up(self) -> bool:
        """Has a rank failed? Then what came over the group is worth nothing."""
        with suppress(RuntimeError):  # the store may be gone, which is not for us to tell
            self._is_given_up = self._is_given_up or self._store.check([_GIVEN_UP])
        return self._is_given_up

    def give_up(self) -> None:
        """This rank has failed, and takes part in no more collectives; `close` comes next."""
        was_made = self._stop_watching()
        self._is_given_up = True
        with suppress(RuntimeError):
            self._store.set(_GIVEN_UP, "")
        if was_made:
            # What this rank has begun would wait for those who are aborted now.
            self._begin_abort()

    def close(self) -> None:
        """Destroy it, in bounded time; every rank calls this. One that will not go is left.

        Nobody goes before all have done with it, since their last bytes may come from there.
        """
        import torch
        import torch.distributed as dist

        if self._stop_watching():
            with suppress(RuntimeError):
                self._meet("end")
            if self._is_given_up and self._aborted is None:
                # Heard of it here before the watcher: what this rank has begun has to end as well.
                self._begin_abort()
        if self._aborted is not None:
            self._aborted.wait(_CLOSE_LIMIT_S)

        def destroy() -> None:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            if self._is_ours and dist.is_initialized():
                dist.destroy_process_group()

        with suppress(RuntimeError):  # of collectives that were aborted
            within(_CLOSE_LIMIT_S, _THREAD, destroy)
        sys.excepthook = self._excepthook

    def _meet(self, where: str) -> bool:
        """Whether all ranks have come there, in time and before one has given up."""
        self._store.set(f"{where}/{self._rank}", "")
        everyone = [f"{where}/{rank}" for rank in range(self._world_size)]
        deadline = time.monotonic() + self._limit_s
        while not self._store.check(everyone):
            if self.is_given_up() or time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)
        return True

    def _stop_watching(self) -> bool:
        """Was the group watched until now?"""
        self._over.set()
        was_watched = self._watcher.is_alive()
        if was_watched:
            self._watcher.join(_CLOSE_LIMIT_S)
        return was_watched

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_UP_EVERY_S):
            if self.is_given_up():
                self._begin_abort()
                return

    def _begin_abort(self) -> None:
        backend: Any = self.group._get_backend(self._device)
        self._aborted = begin_abort(backend, self._device)


def open_default_group(
    backend: Literal["nccl", "gloo"],
    name: str,
    *,
    rank: int,
    world_size: int,
    store: Store,
    device: torch.device,
    interface: str | None,
    limit_s: float,
) -> DefaultGroup:
    """Make torch.distributed's default group; all ranks call this, with a name not used before.

    The making of it, a wait for each other, and each collective of gloo's may take `limit_s`.
    Raises RendezvousError where it could not be made, Forsaken if only because of another rank;
    those who have it all the same close it.
    """
    from torch._C._distributed_c10d import PrefixStore

    own = PrefixStore(f"default/{name}", store)
    made = DefaultGroup(own, device, rank=rank, world_size=world_size, limit_s=limit_s)
    try:
        # On a thread: what waits for a lost peer in NCCL or gloo cannot be called off.
        is_over = within(limit_s + _GRACE_S, _THREAD, lambda: made.make(backend, interface))
    except Exception as error:  # torch's many, and its plug-ins' own
        reason = (str(error) or repr(error)).splitlines()[0]
        is_forsaken = made.is_given_up()
        made.give_up()
        made.close()
        if is_forsaken:
            raise Forsaken("another rank could not make torch's default group") from error
        raise RendezvousError(f"torch's default group could not be created: {reason}") from error
    if not is_over:
        made.give_up()
        raise RendezvousError(
            f"torch's default group could not be created within {format_duration(limit_s)}"
        )
    return made
