"""Which buffers are chosen where memory is short: a pure function of what the ranks have free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from packcast.control.rank_info import RankInfo
from packcast.errors import TransferError
from packcast.io.memory import MemoryLimit
from packcast.launch.fitting import (
    CUDA_AND_NCCL_NBYTES,
    LOW_BUFFER_SIZE,
    LOW_NUM_BUFFERS,
    LOW_STAGING,
    BufferSizes,
    fit_buffers,
)
from packcast.settings import DEFAULT_NUM_BUFFERS, DEFAULT_STAGING, MAX_FITTING_SIZE, Settings
from packcast.units import GIB, MIB

SETTINGS = Settings(command="send", checkpoint=Path("/models/m"))
LARGE = 100 * GIB  # a checkpoint for the largest buffers
USUAL = BufferSizes(MAX_FITTING_SIZE, DEFAULT_NUM_BUFFERS, DEFAULT_STAGING)
LOW_RING = replace(USUAL, buffer_size=LOW_BUFFER_SIZE, num_buffers=LOW_NUM_BUFFERS)


def rank(
    number: int,
    *limits: tuple[str, int],
    host: str = "host-a",
    gpu_free: int | None = None,
) -> RankInfo:
    """A rank of a host whose limits leave so many MiB."""
    return RankInfo(
        role="send" if number == 0 else "recv",
        rank=number,
        host=host,
        boot_id=f"boot-{host}",
        pid=1000 + number,
        gpus=("A",),
        gpu_free=(gpu_free,),
        memory=tuple(
            MemoryLimit(key=key, free=mib * MIB, name=f"the limit {key}") for key, mib in limits
        ),
    )


def on_cpus(*ranks: RankInfo) -> dict[int, str]:
    return dict.fromkeys(range(len(ranks)), "cpu")


def on_gpus(*ranks: RankInfo) -> dict[int, str]:
    return dict.fromkeys(range(len(ranks)), "cuda:0")


def test_the_default_sizes_are_used_if_memory_is_sufficient_or_unknown() -> None:
    plenty, unknown = rank(0, ("host", 9000), gpu_free=40 * GIB), rank(1)
    for devices in (on_cpus, on_gpus):
        fitted = fit_buffers(SETTINGS, LARGE, [plenty, unknown], devices(plenty, unknown))
        assert (fitted.sizes, fitted.is_low, fitted.notes) == (USUAL, False, ())
    small = fit_buffers(SETTINGS, 1, [plenty], on_cpus(plenty))
    assert (small.sizes.buffer_size, small.is_low) == (LOW_BUFFER_SIZE, False)


def test_ranks_below_one_limit_add_up_but_ranks_of_other_containers_do_not() -> None:
    # Four rings are 1 GiB: too much of 1.5, though not of what each container has.
    apart = [rank(i, (f"box-{i}", 600), ("host", 9000)) for i in range(4)]
    assert fit_buffers(SETTINGS, LARGE, apart, on_cpus(*apart)).sizes == USUAL
    elsewhere = [rank(i, ("box", 600), host=f"host-{i}") for i in range(4)]
    assert fit_buffers(SETTINGS, LARGE, elsewhere, on_cpus(*elsewhere)).sizes == USUAL
    together = [rank(i, ("box", 1500 + i), ("host", 9000)) for i in range(4)]
    fitted = fit_buffers(SETTINGS, LARGE, together, on_cpus(*together))
    assert (fitted.sizes, fitted.is_low) == (LOW_RING, True)
    assert fitted.notes == (
        "low on memory: 2 buffers of 16MiB instead of 4 buffers of 64MiB, which is slower, since"
        " rank 0 (host-a, pid 1000) and 3 other ranks there need 1.0 GiB for 4 buffers of 64MiB,"
        " and the limit box leaves 1.5 GiB",
    )


def test_the_error_for_too_little_memory_says_what_is_needed_and_what_is_free() -> None:
    ranks = [rank(i, ("box", 60)) for i in range(2)]
    with pytest.raises(TransferError) as caught:
        fit_buffers(SETTINGS, LARGE, ranks, on_cpus(*ranks))
    assert str(caught.value) == (
        "not enough memory: rank 0 (host-a, pid 1000) and 1 other rank there need 64.0 MiB for"
        " 2 buffers of 16MiB, and the limit box leaves 60.0 MiB"
    )
    assert "reduce --buffer-size and --num-buffers on the sender" in str(caught.value.hint)


def test_sizes_that_the_user_gave_are_kept_or_refused() -> None:
    asked = replace(SETTINGS, buffer_size=128 * MIB, num_buffers=2)
    one = rank(1, ("box", 300))
    fitted = fit_buffers(asked, LARGE, [rank(0), one], on_cpus(one, one))
    assert (fitted.sizes.buffer_size, fitted.sizes.num_buffers) == (128 * MIB, 2)
    assert (fitted.is_low, fitted.notes) == (False, ())
    less = rank(1, ("box", 250))
    with pytest.raises(TransferError, match=r"rank 1 .* needs 256 MiB for 2 buffers of 128MiB"):
        fit_buffers(asked, LARGE, [rank(0), less], on_cpus(less, less))


def test_a_nearly_full_gpu_makes_the_ring_small_on_all_ranks() -> None:
    ranks = [rank(0, gpu_free=40 * GIB), rank(1, gpu_free=900 * MIB)]
    fitted = fit_buffers(SETTINGS, LARGE, ranks, on_gpus(*ranks))
    assert (fitted.sizes, fitted.is_low) == (LOW_RING, True)
    (note,) = fitted.notes
    assert (
        "rank 1 (host-a, pid 1001) needs 256 MiB for 4 buffers of 64MiB, CUDA and NCCL take about"
        " 1.5 GiB more, and cuda:0 has 900 MiB free" in note
    )
    # The GPU's memory is nothing to a ring on the CPUs.
    assert fit_buffers(SETTINGS, LARGE, ranks, on_cpus(*ranks)).sizes == USUAL


def test_a_ring_that_exceeds_the_gpu_is_refused_and_a_tight_one_warns() -> None:
    asked = replace(SETTINGS, buffer_size=64 * MIB, num_buffers=4)
    nearly = rank(0, gpu_free=300 * MIB)
    fitted = fit_buffers(asked, LARGE, [nearly], on_gpus(nearly))
    assert (fitted.sizes, fitted.is_low) == (USUAL, False)
    (note,) = fitted.notes
    assert note.startswith("NCCL may fail: ")
    assert note.endswith("with NCCL_MAX_NCHANNELS=4 NCCL takes less")
    full = rank(0, gpu_free=200 * MIB)
    with pytest.raises(TransferError, match=r"cuda:0 has 200 MiB free") as caught:
        fit_buffers(asked, LARGE, [full], on_gpus(full))
    assert "NCCL_MAX_NCHANNELS" in str(caught.value.hint)
    none = rank(0, gpu_free=0)
    with pytest.raises(TransferError, match=r"needs 32\.0 MiB for 2 buffers of 16MiB"):
        fit_buffers(SETTINGS, LARGE, [none], on_gpus(none))
    enough = rank(0, gpu_free=USUAL.ring_nbytes + CUDA_AND_NCCL_NBYTES)
    assert fit_buffers(asked, LARGE, [enough], on_gpus(enough)).notes == ()


def test_with_gpus_the_hosts_memory_limits_the_staging() -> None:
    ranks = [rank(i, ("box", 700), gpu_free=40 * GIB) for i in range(4)]
    fitted = fit_buffers(SETTINGS, LARGE, ranks, on_gpus(*ranks))
    assert (fitted.sizes, fitted.is_low) == (replace(USUAL, staging=LOW_STAGING), True)
    assert "staging of 48MiB instead of staging of 100MiB" in fitted.notes[0]
    more = [rank(i, ("box", 1200), gpu_free=40 * GIB) for i in range(4)]
    assert fit_buffers(SETTINGS, LARGE, more, on_gpus(*more)).sizes == USUAL
    both = replace(SETTINGS, readers=2)  # one of them writes, too
    assert fit_buffers(both, LARGE, more, on_gpus(*more)).sizes.staging == LOW_STAGING
    asked = replace(SETTINGS, staging=GIB)
    with pytest.raises(TransferError, match=r"the limit box leaves 700 MiB") as caught:
        fit_buffers(asked, LARGE, ranks, on_gpus(*ranks))
    assert "reduce --staging on the sender" in str(caught.value.hint)
