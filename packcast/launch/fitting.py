"""The buffer sizes to offer: as requested, or defaults that fit into every rank's memory.

Pure functions over the free memory that the ranks reported when they joined. Knows no torch.
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
# Measured on two H100 over NVLink: CUDA's context 0.67 GiB, NCCL's group and its first broadcast
# 0.76 GiB, or 0.36 GiB with NCCL_MAX_NCHANNELS=4.
CUDA_AND_NCCL_NBYTES = 3 * GIB // 2

NEARLY_FULL_GPU = "let others take less of that GPU; with NCCL_MAX_NCHANNELS=4 NCCL takes less"


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """The sizes in an offer, in bytes; the count; and the ring as text."""

    buffer_size: int
    num_buffers: int
    staging: int

    @property
    def ring(self) -> str:
        return format_buffers(self.num_buffers, self.buffer_size)

    @property
    def ring_nbytes(self) -> int:
        """The ring's memory on each rank's device."""
        return ring_nbytes(self.buffer_size, self.num_buffers)

    @property
    def pinned_nbytes(self) -> int:
        """The most pinned memory of a rank with a GPU for what it reads, or for what it writes."""
        return pinned_nbytes(self.buffer_size, self.staging)


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """`free` bytes of a GPU, or below a limit of a host, that `num_ranks` ranks share equally.

    `whose` names the ranks in messages. `beside` is what each of them will allocate besides.
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
        """Whether `nbytes` for each rank leave too little: on a host, less than half of it."""
        share = self.free if self.is_gpu else self.free // 2
        return self.num_ranks * (nbytes + self.beside) > share

    def is_short(self, nbytes: int) -> bool:
        """Whether there is less than `nbytes` for each rank."""
        return self.num_ranks * nbytes > self.free

    def described(self, what: str, nbytes: int) -> str:
        """For a message: how much `what` needs, and how much is free."""
        needed = f"{self.whose} needs {format_size(nbytes)} for {what}"
        if self.num_ranks > 1:
            needed = f"{self.whose} need {format_size(self.num_ranks * nbytes)} for {what}"
        if self.is_gpu:
            beside = f", CUDA and NCCL take about {format_size(self.beside)} more"
            return f"{needed}{beside}, and {self.name} has {format_size(self.free)} free"
        return f"{needed}, and {self.name} leaves {format_size(self.free)}"


@dataclass(frozen=True, slots=True)
class Fitted:
    """The sizes to offer. `is_low`: memory is short, so they are smaller than the defaults.

    `notes` are warnings: why, or what may fail later.
    """

    sizes: BufferSizes
    is_low: bool
    notes: tuple[str, ...]


def fit_buffers(
    settings: Settings, nbytes: int, infos: Sequence[RankInfo], devices: Mapping[int, str]
) -> Fitted:
    """The buffers for a checkpoint of `nbytes` on these ranks, whose devices are `devices`.

    If memory is short, defaults are replaced by smaller sizes; sizes that the user gave are kept.
    Raises TransferError if a rank has too little memory even so. Memory that other processes
    allocate after the ranks have joined is not seen here: see `transfer.host_share`.
    """
    size = settings.buffer_size or fitting_buffer_size(nbytes)
    sizes = BufferSizes(size, settings.num_buffers, settings.staging)
    hosts = list(_memory_of_hosts(infos))
    gpus = list(_memory_of_gpus(infos, devices))
    on_gpus = any(device != "cpu" for device in devices.values())
    is_default = settings.buffer_size is None and settings.num_buffers == DEFAULT_NUM_BUFFERS
    notes: list[str] = []
    sizes = _settle(
        gpus if on_gpus else hosts,
        sizes,
        low=replace(sizes, buffer_size=LOW_BUFFER_SIZE, num_buffers=LOW_NUM_BUFFERS)
        if is_default
        else None,
        need=lambda sizes: sizes.ring_nbytes,
        say=lambda sizes: sizes.ring,
        lower="--buffer-size and --num-buffers",
        notes=notes,
    )
    if on_gpus:
        num_ends = 1 if settings.readers == 1 else 2  # of a rank that reads and writes
        sizes = _settle(
            hosts,
            sizes,
            low=replace(sizes, staging=LOW_STAGING)
            if settings.staging == DEFAULT_STAGING
            else None,
            need=lambda sizes: num_ends * sizes.pinned_nbytes,
            say=lambda sizes: f"staging of {format_exact_size(sizes.staging)}",
            lower="--staging",
            notes=notes,
        )
    is_low = sizes != BufferSizes(size, settings.num_buffers, settings.staging)
    return Fitted(sizes, is_low, tuple(notes))


def _settle(
    memories: Sequence[FreeMemory],
    wanted: BufferSizes,
    *,
    low: BufferSizes | None,
    need: Callable[[BufferSizes], int],
    say: Callable[[BufferSizes], str],
    lower: str,
    notes: list[str],
) -> BufferSizes:
    """`wanted`; or `low`, if that is given and some memory is too tight for `wanted`."""
    sizes = wanted
    tight = next((each for each in memories if each.is_tight(need(wanted))), None)
    if tight and low and need(low) < need(wanted):
        sizes = low
        notes.append(
            f"low on memory: {say(low)} instead of {say(wanted)}, which is slower, since"
            f" {tight.described(say(wanted), need(wanted))}"
        )
    short = next((each for each in memories if each.is_short(need(sizes))), None)
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


def _hint(memory: FreeMemory, lower: str) -> str:
    more = NEARLY_FULL_GPU if memory.is_gpu else "start fewer ranks there, or raise that limit"
    return f"reduce {lower} on the sender, or {more}"


def _memory_of_hosts(infos: Sequence[RankInfo]) -> Iterator[FreeMemory]:
    """Each memory limit with the ranks below it: each container of a host may have its own."""
    sharing: dict[tuple[str, str], list[RankInfo]] = {}
    for info in infos:
        for limit in info.memory:
            sharing.setdefault((info.boot_id, limit.key), []).append(info)
    for (_, key), ranks in sharing.items():
        limits = [limit for info in ranks for limit in info.memory if limit.key == key]
        least = min(limits, key=lambda limit: limit.free)
        others = len(ranks) - 1
        more = f" and {others} other rank{'s' * (others > 1)} there" if others else ""
        yield FreeMemory(ranks[0].label + more, len(ranks), least.name, least.free)


def _memory_of_gpus(infos: Sequence[RankInfo], devices: Mapping[int, str]) -> Iterator[FreeMemory]:
    for info in infos:
        assert info.rank is not None, "all have joined"
        device = devices[info.rank]
        index = int(device.partition(":")[2] or -1)
        free = info.gpu_free[index] if 0 <= index < len(info.gpu_free) else None
        if free is not None:
            yield FreeMemory(info.label, 1, device, free, CUDA_AND_NCCL_NBYTES)
