"""What can broadcast: process groups first, bare objects next, and an error for the rest."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from packcast.errors import UsageError
from packcast.packed.communicator import communicator_of
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer

REPOSITORY = Path(__file__).parents[2]


class Bare:
    """The least that can broadcast."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, int]] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.calls.append((tensor, src))


class Engine(Bare):
    """One that tells more, as those of engines do."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = device
        self.rank = 2
        self.world_size = 5


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def test_a_group_that_was_destroyed_goes_and_using_it_is_an_error() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    communicator, group = communicator_of(dist.group.WORLD), weakref.ref(dist.group.WORLD)
    communicator.broadcast(torch.arange(4), 0)
    dist.destroy_process_group()
    gc.collect()
    assert group() is None
    with pytest.raises(UsageError, match="has been destroyed"):
        communicator.broadcast(torch.arange(4), 0)


def test_a_process_group_is_asked_for_first_although_it_has_a_broadcast_of_its_own(
    world: dist.ProcessGroup,
) -> None:
    tensor = torch.arange(4)
    assert callable(world.broadcast)
    with pytest.raises(TypeError):
        world.broadcast(tensor, src=0)
    communicator = communicator_of(world)
    communicator.broadcast(tensor, 0)
    assert (communicator.rank, communicator.world_size) == (0, 1)
    assert communicator.device == torch.device("cpu")


def test_a_group_of_no_named_backend_is_where_its_backends_are() -> None:
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert "nccl" not in dist.get_backend(), "asking for the name would not do"
        device = communicator_of(dist.group.WORLD).device
    finally:
        dist.destroy_process_group()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_whole_transfer_through_a_process_group_of_one(world: dist.ProcessGroup) -> None:
    pairs = [("a", torch.arange(5)), ("b", torch.ones(()))]
    packed_broadcast_producer(iter(pairs), world, 0, lambda pair: pair[1], 8, 2)


def test_a_real_dtensor_is_refused_by_name_until_it_is_whole(world: dist.ProcessGroup) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh = DeviceMesh.from_group(world, "cpu")
    sharded = DTensor.from_local(torch.arange(3), mesh, [Replicate()])
    bare = Engine("cpu")
    with pytest.raises(UsageError, match=r"layer\.1 is a DTensor") as caught:
        packed_broadcast_producer(iter([("layer.1", sharded)]), bare, 0, lambda pair: pair[1])
    assert "full_tensor()" in str(caught.value.hint)
    assert not bare.calls

    def whole(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
        assert isinstance(pair[1], DTensor)
        full: torch.Tensor = pair[1].full_tensor()
        return full

    packed_broadcast_producer(iter([("layer.1", sharded)]), bare, 0, whole)
    assert bare.calls[0][0].view(torch.int64).tolist() == [0, 1, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is the current GPU")
def test_a_bare_object_without_a_device_works_on_the_cpu_where_there_is_no_gpu() -> None:
    bare = Bare()
    communicator = communicator_of(bare)
    tensor = torch.zeros(3)
    communicator.broadcast(tensor, 7)
    assert bare.calls[0][0] is tensor
    assert bare.calls[0][1] == 7
    assert communicator.device == torch.device("cpu")
    assert (communicator.rank, communicator.world_size) == (None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("group", [Bare(), Engine("cuda")])
def test_a_bare_object_works_on_the_current_gpu_where_there_is_one(group: Bare) -> None:
    assert communicator_of(group).device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", None])
def test_a_group_with_nccl_works_on_the_gpu(backend: str | None) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        communicator = communicator_of(dist.group.WORLD)
        tensor = torch.arange(3, device=device)
        communicator.broadcast(tensor, 0)
        assert tensor.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()
    assert communicator.device == device


def test_a_bare_object_says_where_its_tensors_belong_and_who_it_is() -> None:
    communicator = communicator_of(Engine("cpu"))
    assert communicator.device == torch.device("cpu")
    assert (communicator.rank, communicator.world_size) == (2, 5)
    assert communicator_of(Engine(torch.device("cuda", 3))).device == torch.device("cuda", 3)


class Deaf:
    broadcast = "a name, not a method"


@pytest.mark.parametrize("group", [None, object(), Deaf(), -100, "gloo"], ids=range(5))
def test_what_cannot_broadcast_is_refused_before_anything_is_asked_for(group: object) -> None:
    def untouched() -> Iterator[tuple[str, torch.Tensor]]:
        pytest.fail("the iterator was pulled")
        yield "never", torch.zeros(0)

    kind = type(group).__name__
    with pytest.raises(UsageError, match=f"a {kind} cannot broadcast") as caught:
        packed_broadcast_producer(untouched(), group, 0, lambda pair: pair[1])
    assert "process group" in str(caught.value.hint)
    with pytest.raises(UsageError, match=f"a {kind} cannot broadcast"):
        packed_broadcast_consumer(iter([]), group, 0, print)


# One process imports torch and forks, before torch has a thread.
THREE_RANKS = """
import os, sys
import torch
import torch.distributed as dist
from packcast.packed.communicator import communicator_of
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer

children = []
rank = 0
for other in (1, 2):
    child = os.fork()
    if not child:
        rank, children = other, []
        break
    children.append(child)

def end(code):
    if rank:
        os._exit(code)
    codes = [os.waitpid(child, 0)[1] for child in children]
    print(f"ended {[code, *codes]}", flush=True)

def transfer(group, src, sender):
    pairs = [(f"t{i}", torch.arange(i, dtype=torch.float32) + 10 * sender) for i in range(9)]
    if rank == sender:
        packed_broadcast_producer(iter(pairs), group, src, lambda pair: pair[1], 50, 2)
        return
    described = [(name, (tensor.shape, tensor.dtype)) for name, tensor in pairs]
    received = []
    packed_broadcast_consumer(iter(described), group, src, received.extend, 50, 3)
    assert [name for name, _ in received] == [name for name, _ in pairs]
    for (name, got), (_, sent) in zip(received, pairs, strict=True):
        assert torch.equal(got, sent), (rank, name, got, sent)

try:
    store = dist.FileStore(sys.argv[1], 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    transfer(dist.group.WORLD, src=2, sender=2)
    part = dist.new_group([2, 1])
    if rank:
        mine = communicator_of(part)
        assert mine.world_size == 2
        for src in (0, 1):
            sender = dist.get_global_rank(part, src)
            assert mine.rank == dist.get_group_rank(part, rank)
            transfer(part, src, sender)
    dist.barrier()
    dist.destroy_process_group()
except BaseException:
    import traceback
    traceback.print_exc()
    end(1)
else:
    end(0)
"""


def test_src_is_the_rank_within_the_group_also_in_a_subgroup(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", THREE_RANKS, str(tmp_path / "store")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "ended [0, 0, 0]\n", ran.stderr
