"""Which buffers every rank has room for: those that were asked for, or, where nobody asked for
any, smaller ones.

Pure functions over what the ranks said of their memory when they joined. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from packcast.control.rank_info import RankInfo
from packcast.errors import TransferError
from packcast.packed.plan import pinned_nbytes, ring_nbytes
from packcast.settings import (
    DEFAULT_NUM_BUFFERS,
    DEFAULT_STAGING,
    MIN_FITTING_SIZE,
    Settings,
    fitting_buffer_size,
)
from packcast.units import GIB, MIB, format_buffers, format_exact_size, format_size

LOW_BUFFER_SIZE, LOW_NUM_BUFFERS, LOW_STAGING = MIN_FITTING_SIZE, 2, 48 * MIB
# A context of CUDA takes nearly 0.5 GiB. NCCL takes about 10 MiB for each channel and neighbour
# (4 MiB of them are NCCL_BUFFSIZE): over NVLink up to 24 channels, more with a network's beside.
CUDA_AND_NCCL_NBYTES = GIB

NEARLY_FULL_GPU = "let others take less of that GPU; with NCCL_MAX_NCHANNELS=4 NCCL takes less"


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """What the offer says of buffers, in bytes; and how that is said to people."""

    buffer_size: int
    num_buffers: int
    staging: int

    @property
    def ring(self) -> str:
        return format_buffers(self.num_buffers, self.buffer_size)

    @property
    def ring_nbytes(self) -> int:
        """Of a rank, on its device."""
        return ring_nbytes(self.buffer_size, self.num_buffers)

    @property
    def pinned_nbytes(self) -> int:
        """Of a rank with a GPU, at most."""
        return pinned_nbytes(self.buffer_size, self.staging)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of which so many ranks want the same each: a GPU's, or what a limit leaves a host's.

    `whose` says for people which ranks these are. `beside` is what else each of them will take.
    """

    whose: str
    num_ranks: int
    name: str
    free: int
    beside: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.beside > 0

    def is_tight(self, nbytes: int) -> bool:
        """Whether so many bytes for each leave too little to the rest: on a host, half of it."""
        share = self.free if self.is_gpu else self.free // 2
        return self.num_ranks * (nbytes + self.beside) > share

    def is_short(self, nbytes: int) -> bool:
        """Whether there are not so many bytes for each."""
        return self.num_ranks * nbytes > self.free

    def described(self, what: str, nbytes: int) -> str:
        """In words: how much `what` needs, and how much there is."""
        needed = f"{self.whose} needs {format_size(nbytes)} for {what}"
        if self.num_ranks > 1:
            needed = f"{self.whose} need {format_size(self.num_ranks * nbytes)} for {what}"
        if self.is_gpu:
            beside = f", CUDA and NCCL take about {format_size(self.beside)} more"
            return f"{needed}{beside}, and {self.name} has {format_size(self.free)} free"
        return f"{needed}, and {self.name} leaves {format_size(self.free)}"


@dataclass(frozen=True, slots=True)
class Fitted:
    """The sizes to offer; `is_low` where they are smaller than they would be with more memory.
    `notes` say why, or what may still fail."""

    sizes: BufferSizes
    is_low: bool
    notes: tuple[str, ...]


def fit_buffers(
    settings: Settings, nbytes: int, infos: Sequence[RankInfo], devices: Mapping[int, str]
) -> Fitted:
    """The buffers for a checkpoint of `nbytes` on these ranks, each with its device.

    Sizes that nobody asked for are made smaller where memory is short. Raises TransferError where
    some rank has no room for what is left then. What it goes by is what was free when the ranks
    joined: what another process takes meanwhile is met by the rank itself.
    """
    size = settings.buffer_size or fitting_buffer_size(nbytes)
    sizes = BufferSizes(size, settings.num_buffers, settings.staging)
    hosts = list(_rooms_on_hosts(infos))
    gpus = list(_rooms_on_gpus(infos, devices))
    on_gpus = any(device != "cpu" for device in devices.values())
    is_default = settings.buffer_size is None and settings.num_buffers == DEFAULT_NUM_BUFFERS
    notes: list[str] = []
    sizes = _settle(
        gpus if on_gpus else hosts,
        sizes,
        low=replace(sizes, buffer_size=LOW_BUFFER_SIZE, num_buffers=LOW_NUM_BUFFERS)
        if is_default
        else None,
        need=lambda them: them.ring_nbytes,
        say=lambda them: them.ring,
        lower="--buffer-size and --num-buffers",
        notes=notes,
    )
    if on_gpus:
        sizes = _settle(
            hosts,
            sizes,
            low=replace(sizes, staging=LOW_STAGING)
            if settings.staging == DEFAULT_STAGING
            else None,
            need=lambda them: them.pinned_nbytes,
            say=lambda them: f"staging of {format_exact_size(them.staging)}",
            lower="--staging",
            notes=notes,
        )
    is_low = sizes != BufferSizes(size, settings.num_buffers, settings.staging)
    return Fitted(sizes, is_low, tuple(notes))


def _settle(
    rooms: Sequence[Room],
    wanted: BufferSizes,
    *,
    low: BufferSizes | None,
    need: Callable[[BufferSizes], int],
    say: Callable[[BufferSizes], str],
    lower: str,
    notes: list[str],
) -> BufferSizes:
    """`wanted`, or `low` where some room is too tight for that, and there is such a one."""
    sizes = wanted
    tight = next((room for room in rooms if room.is_tight(need(wanted))), None)
    if tight and low and need(low) < need(wanted):
        sizes = low
        notes.append(
            f"low on memory: {say(low)} instead of {say(wanted)}, which is slower, since"
            f" {tight.described(say(wanted), need(wanted))}"
        )
    short = next((room for room in rooms if room.is_short(need(sizes))), None)
    if short:
        raise TransferError(
            f"not enough memory: {short.described(say(sizes), need(sizes))}",
            hint=_hint(short, lower),
        )
    if tight and tight.is_gpu and sizes == wanted:
        notes.append(
            f"NCCL may fail: {tight.described(say(wanted), need(wanted))}; {NEARLY_FULL_GPU}"
        )
    return sizes


def _hint(room: Room, lower: str) -> str:
    more = NEARLY_FULL_GPU if room.is_gpu else "start fewer ranks there, or raise that limit"
    return f"reduce {lower} on the sender, or {more}"


def _rooms_on_hosts(infos: Sequence[RankInfo]) -> Iterator[Room]:
    """Each limit with those who share it: containers of one host have some of their own."""
    sharing: dict[tuple[str, str], list[RankInfo]] = {}
    for info in infos:
        for limit in info.memory:
            sharing.setdefault((info.boot_id, limit.key), []).append(info)
    for (_, key), them in sharing.items():
        limits = [limit for info in them for limit in info.memory if limit.key == key]
        least = min(limits, key=lambda limit: limit.free)
        others = len(them) - 1
        more = f" and {others} other rank{'s' * (others > 1)} there" if others else ""
        yield Room(them[0].label + more, len(them), least.name, least.free)


def _rooms_on_gpus(infos: Sequence[RankInfo], devices: Mapping[int, str]) -> Iterator[Room]:
    for info in infos:
        assert info.rank is not None, "all have joined"
        device = devices[info.rank]
        index = int(device.partition(":")[2] or -1)
        free = info.gpu_free[index] if 0 <= index < len(info.gpu_free) else None
        if free is not None:
            yield Room(info.label, 1, device, free, CUDA_AND_NCCL_NBYTES)
