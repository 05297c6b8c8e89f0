"""Who gets which GPU: a pure function, so every case is a table of members."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcast.control.rank_info import RankInfo
from packcast.errors import RendezvousError
from packcast.launch.devices import assign_devices, boot_id, host_name, visible_gpus


def member(
    rank: int,
    *gpus: str,
    host: str = "host-a",
    local_rank: int | None = None,
    device: str = "auto",
) -> RankInfo:
    return RankInfo(
        role="recv",
        rank=rank,
        host=host,
        boot_id=f"boot-{host}",
        pid=1000 + rank,
        local_rank=local_rank,
        device=device,
        gpus=gpus,
    )


def test_each_rank_of_a_launch_gets_the_gpu_of_its_local_rank() -> None:
    members = [member(rank, "A", "B", "C", local_rank=rank) for rank in (2, 0, 1)]
    result = assign_devices(members, "auto")
    assert result.backend == "nccl"
    assert result.devices == {0: "cuda:0", 1: "cuda:1", 2: "cuda:2"}
    assert not result.loud


def test_two_launches_on_one_host_do_not_meet_on_gpu_0() -> None:
    members = [member(rank, "A", "B", "C", "D", local_rank=rank % 2) for rank in range(4)]
    assert assign_devices(members, "auto").devices == {
        0: "cuda:0",
        1: "cuda:1",
        2: "cuda:2",
        3: "cuda:3",
    }


def test_gpus_of_the_same_number_on_two_hosts_are_two_gpus() -> None:
    members = [member(0, "A", host="a", local_rank=0), member(1, "B", host="b", local_rank=0)]
    assert assign_devices(members, "auto").devices == {0: "cuda:0", 1: "cuda:0"}


def test_two_containers_of_one_host_share_its_gpus_by_uuid_not_by_number() -> None:
    members = [member(0, "A", "B", local_rank=0), member(1, "B", "A", local_rank=0)]
    assert assign_devices(members, "auto").devices == {0: "cuda:0", 1: "cuda:0"}
    members = [member(0, "A", "B", local_rank=0), member(1, "A", local_rank=0)]
    assert assign_devices(members, "auto").devices == {0: "cuda:1", 1: "cuda:0"}


def test_a_rank_that_is_shown_one_gpu_only_takes_it_whatever_its_local_rank() -> None:
    members = [member(0, "A", local_rank=0), member(1, "B", local_rank=1)]
    assert assign_devices(members, "auto").devices == {0: "cuda:0", 1: "cuda:0"}


def test_without_local_ranks_any_free_gpu_will_do() -> None:
    members = [member(rank, "A", "B", "C") for rank in range(3)]
    assert set(assign_devices(members, "auto").devices.values()) == {"cuda:0", "cuda:1", "cuda:2"}


def test_an_explicit_gpu_goes_before_another_ranks_preference() -> None:
    members = [member(0, "A", "B", local_rank=0), member(1, "A", "B", device="cuda:0")]
    assert assign_devices(members, "auto").devices == {0: "cuda:1", 1: "cuda:0"}


def test_one_rank_without_a_gpu_means_gloo_for_all_and_says_so_loudly() -> None:
    result = assign_devices([member(0, "A"), member(1, host="host-b")], "auto")
    assert result.backend == "gloo"
    assert result.devices == {0: "cpu", 1: "cpu"}
    assert result.loud
    assert result.reason == "GPUs stay unused since rank 1 (host-b, pid 1001) sees no GPU"


def test_more_ranks_than_gpus_means_gloo_and_says_so_loudly() -> None:
    result = assign_devices([member(0, "A", local_rank=0), member(1, "A", local_rank=1)], "auto")
    assert result.backend == "gloo"
    assert result.loud
    assert "sees 1 GPU, all given to other ranks of its host" in result.reason


def test_no_gpu_anywhere_is_nothing_to_be_loud_about() -> None:
    result = assign_devices([member(0), member(1)], "auto")
    assert (result.backend, result.loud, result.reason) == ("gloo", False, "no rank sees a GPU")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_gloo_as_asked_uses_cpus_and_is_not_loud(device: str) -> None:
    result = assign_devices([member(0, "A", device=device), member(1, "B")], "gloo")
    assert result.devices == {0: "cpu", 1: "cpu"}
    assert not result.loud


def test_one_rank_on_cpu_as_asked_means_gloo_for_all() -> None:
    result = assign_devices([member(0, "A", device="cpu"), member(1, "B")], "auto")
    assert (result.backend, result.loud) == ("gloo", False)
    assert "rank 0 (host-a, pid 1000) asks for --device cpu" in result.reason


@pytest.mark.parametrize(
    ("members", "backend", "sentence"),
    [
        ([member(0, "A"), member(1)], "nccl", "--backend nccl is not possible: rank 1 .* no GPU"),
        (
            [member(0, "A"), member(1, device="cuda")],
            "auto",
            "--device cuda is not possible",
        ),
        ([member(0, "A", device="cuda:1")], "auto", "asks for --device cuda:1, but sees 1 GPU"),
        (
            [member(0, "A", device="cuda:0"), member(1, "A", device="cuda:0")],
            "auto",
            "rank 1 .* and rank 0 .* ask for the same GPU, A",
        ),
        ([member(0, "A", device="cuda"), member(1, device="cpu")], "auto", "but rank 1 .* cpu"),
        ([member(0, "A", device="cuda")], "gloo", "--backend gloo works on CPU buffers"),
        ([member(0, "A", device="cpu")], "nccl", "needs GPUs, but rank 0"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_is_an_error_that_names_the_rank(
    members: list[RankInfo], backend: str, sentence: str
) -> None:
    assert backend in ("auto", "nccl", "gloo")
    with pytest.raises(RendezvousError, match=sentence):
        assign_devices(members, backend)


GPUS = st.lists(st.sampled_from("ABCDEF"), unique=True, max_size=4)


@given(st.lists(st.tuples(GPUS, st.sampled_from("xy"), st.integers(0, 3)), max_size=6))
def test_no_gpu_is_ever_given_out_twice_and_cpu_only_if_it_must_be(
    ranks: list[tuple[list[str], str, int]],
) -> None:
    members = [
        member(rank, *gpus, host=host, local_rank=local)
        for rank, (gpus, host, local) in enumerate(ranks)
    ]
    result = assign_devices(members, "auto")
    if result.backend == "nccl":
        taken = [
            (m.host, m.gpus[int(result.devices[rank].removeprefix("cuda:"))])
            for rank, m in enumerate(members)
        ]
        assert len(set(taken)) == len(members)
    else:
        assert not _distinct_gpus(members, frozenset())


def _distinct_gpus(members: list[RankInfo], taken: frozenset[tuple[str, str]]) -> bool:
    """Whether there is any way at all, by trying them all."""
    if not members:
        return True
    first, *others = members
    return any(
        _distinct_gpus(others, taken | {(first.host, gpu)})
        for gpu in first.gpus
        if (first.host, gpu) not in taken
    )


def test_a_host_has_a_name_and_an_identity_that_stays() -> None:
    assert host_name()
    assert boot_id() == boot_id() != ""


def test_without_a_driver_torch_is_not_even_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packcast.launch.devices._DRIVERS", ())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert visible_gpus() == ()


# What the driver says, since torch has no public name for it.
HAS_CONTEXT = """
import ctypes
from packcast.launch.devices import visible_gpus

def has_context(index):
    device, flags, is_active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert cuda.cuDeviceGet(ctypes.byref(device), index) == 0
    state = ctypes.byref(flags), ctypes.byref(is_active)
    assert cuda.cuDevicePrimaryCtxGetState(device, *state) == 0
    return bool(is_active.value)

gpus = visible_gpus()
cuda = ctypes.CDLL("libcuda.so.1")
assert cuda.cuInit(0) == 0
print(len(gpus), any(map(has_context, range(len(gpus)))))
"""


@pytest.mark.gpu
def test_listing_the_gpus_makes_no_context_on_any_of_them() -> None:
    out = subprocess.run(
        [sys.executable, "-c", HAS_CONTEXT], capture_output=True, text=True, check=True
    )
    count, has_context = out.stdout.split()
    assert int(count) > 0
    assert has_context == "False"
