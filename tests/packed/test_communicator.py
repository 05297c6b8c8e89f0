"""What can broadcast: process groups first, bare objects next, and an error for the rest."""

from __future__ import annotations

import datetime
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work

from packcast.errors import TransferError, UsageError
from packcast.packed.communicator import communicator_of
from packcast.packed.compat import (
    packed_broadcast_consumer,
    packed_broadcast_producer,
    packed_nccl_broadcast_consumer,
)
from packcast.packed.replay import ReplayReceiver, ReplaySender
from tests.helpers.commands import run_warm
from tests.packed.wire_model import Player, Recorder


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    marked: Callable[..., None] = pytest.mark.gpu(skip(test))
    return marked


class Bare:
    """The least that can broadcast."""

    device: object = None

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, int]] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.calls.append((tensor, src))


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


def test_a_real_dtensor_is_refused_by_name_until_it_is_whole(world: dist.ProcessGroup) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh = DeviceMesh.from_group(world, "cpu")
    sharded = DTensor.from_local(torch.arange(3), mesh, [Replicate()])
    bare = Recorder()
    with pytest.raises(UsageError, match=r"layer\.1 is a DTensor") as caught:
        packed_broadcast_producer(iter([("layer.1", sharded)]), bare, 0, lambda pair: pair[1])
    assert "full_tensor()" in str(caught.value.hint)
    assert not bare.wire

    def whole(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
        assert isinstance(pair[1], DTensor)
        full: torch.Tensor = pair[1].full_tensor()
        return full

    packed_broadcast_producer(iter([("layer.1", sharded)]), bare, 0, whole)
    assert bare.wire == [torch.arange(3).numpy().tobytes()]


def test_a_bare_object_gets_the_tensor_itself() -> None:
    bare, tensor = Bare(), torch.zeros(3)
    communicator = communicator_of(bare)
    communicator.broadcast(tensor, 7)
    assert bare.calls[0][0] is tensor
    assert bare.calls[0][1] == 7
    assert (communicator.rank, communicator.world_size) == (None, None)
    known = communicator_of(Knows(2, 5))
    assert (known.rank, known.world_size) == (2, 5)


@pytest.mark.parametrize(
    ("own", "given", "device"),
    [
        (None, None, "cuda" if torch.cuda.is_available() else "cpu"),
        (None, "cpu", "cpu"),
        (None, "cuda:3", "cuda:3"),
        ("cpu", None, "cpu"),
        ("cpu", torch.device("cpu"), "cpu"),
        (torch.device("cuda", 3), None, "cuda:3"),
    ],
)
def test_a_bare_objects_own_device_comes_before_the_one_that_is_given(
    own: object, given: torch.device | str | None, device: str
) -> None:
    bare = Bare()
    bare.device = own
    found = communicator_of(bare, given).device
    assert str(found) == device or found == torch.device("cuda", torch.cuda.current_device())


@needs_gpu
def test_groups_with_nccl_that_torch_does_not_know_work_on_the_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    mine = dist.HashStore(), 0, 1
    backend, group = dist.ProcessGroupNCCL(*mine), dist.ProcessGroup(*mine)
    kind = dist.ProcessGroup.BackendType.NCCL
    group._set_default_backend(kind)
    group._register_backend(torch.device("cuda"), kind, backend)
    for one in (backend, group):
        communicator = communicator_of(one)
        assert (communicator.device, communicator.rank, communicator.world_size) == (device, 0, 1)
        tensor = torch.arange(3, device=device)
        communicator.broadcast(tensor, 0)
        assert tensor.tolist() == [0, 1, 2]
    backend.shutdown()


@needs_gpu
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


@pytest.mark.parametrize("group", [None, SimpleNamespace(broadcast="a name"), "gloo"], ids=range(3))
def test_what_cannot_broadcast_is_refused_before_the_iterator_is_read(group: object) -> None:
    kind = type(group).__name__
    with pytest.raises(UsageError, match=f"a {kind} cannot broadcast") as caught:
        packed_broadcast_producer(untouched(), group, 0, lambda pair: pair[1])
    assert "process group" in str(caught.value.hint)
    with pytest.raises(UsageError, match=f"a {kind} cannot broadcast"):
        packed_broadcast_consumer(iter([]), group, 0, print)


class Knows(Recorder):
    """It tells who it is; in methods, as torch's groups do, where `by_call`."""

    def __init__(self, rank: int | None, world_size: int | None, *, by_call: bool = False) -> None:
        super().__init__()
        self.rank = (lambda: rank) if by_call else rank
        self.world_size = (lambda: world_size) if by_call else world_size


def untouched() -> Iterator[tuple[str, torch.Tensor]]:
    pytest.fail("the iterator was pulled")
    yield "never", torch.zeros(0)


@pytest.mark.parametrize("by_call", [False, True])
@pytest.mark.parametrize(
    ("rank", "world_size", "src", "says"),
    [
        (0, 2, 1, "this rank, which sends, is 0 in the group"),
        (0, None, 1, "this rank, which sends, is 0 in the group"),
        (1, 2, 1, "that is this rank, which receives"),
        (1, None, 1, "that is this rank, which receives"),
        (1, 2, 2, "the group has the ranks 0 to 1"),
        (None, 2, 2, "the group has the ranks 0 to 1"),
        (0, 2, -1, "no rank"),
        (None, None, -1, "no rank"),
        (0, 2, "0", "no rank"),
    ],
)
def test_a_wrong_src_is_refused_before_anything_moves(
    rank: int | None, world_size: int | None, src: int, says: str, *, by_call: bool
) -> None:
    group = Knows(rank, world_size, by_call=by_call)
    sends = (
        lambda: packed_broadcast_producer(untouched(), group, src, lambda pair: pair[1]),
        lambda: ReplaySender({"a": torch.zeros(3)}, group, src),
    )
    receives = (
        lambda: packed_broadcast_consumer(iter([]), group, src, print),
        lambda: ReplayReceiver(group, src),
    )
    calls = [*(sends if "receives" not in says else ()), *(receives if "sends" not in says else ())]
    for call in calls:
        with pytest.raises(UsageError, match=f"src is '?{src}'?, .*{says}"):
            call()
    assert group.wire == []


@pytest.mark.parametrize(("name", "value"), [("disabled", True), ("available", False)])
def test_a_group_whose_broadcast_does_nothing_is_refused(name: str, *, value: bool) -> None:
    group = Recorder()
    setattr(group, name, value)
    one = {"a": torch.zeros(3)}
    for call in (
        lambda: packed_broadcast_producer(untouched(), group, 0, lambda pair: pair[1]),
        lambda: packed_broadcast_consumer(iter([]), group, 0, print),
        lambda: ReplaySender(one, group, 0),
        lambda: ReplayReceiver(group, 0),
    ):
        with pytest.raises(UsageError, match="this Recorder is disabled"):
            call()
    setattr(group, name, not value)
    sender = ReplaySender(one, group, 0)
    sender.send(one)
    setattr(group, name, value)
    with pytest.raises(UsageError, match="this Recorder is disabled"):
        sender.send(one)
    setattr(group, name, not value)
    sender.send(one)
    assert len(group.wire) == 3 + 2


def test_a_consumer_accepts_the_device_of_the_groups_tensors_and_no_other() -> None:
    got: list[tuple[str, torch.Tensor]] = []
    described = [("a", ((3,), torch.uint8))]
    packed_nccl_broadcast_consumer(
        iterator=iter(described),
        group=Player([b"abc"]),
        src=0,
        post_unpack_func=got.extend,
        buffer_size_bytes=8,
        num_buffers=2,
        device="cpu",
    )
    assert [(name, bytes(tensor.tolist())) for name, tensor in got] == [("a", b"abc")]
    with pytest.raises(UsageError, match=r"device is cuda:1, but the group's tensors .* on cpu"):
        packed_nccl_broadcast_consumer(
            iter(described), Player([b"abc"]), 0, print, 8, 2, torch.device("cuda:1")
        )


class StoreGroup:
    """An engine's stateless group, whose broadcast returns what it has received."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int, sent: list[torch.Tensor]) -> None:
        self.rank, self.world_size, self._sent = rank, world_size, sent

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        if self.rank == src:
            self._sent.append(tensor.clone())
            return tensor
        return self._sent.pop(0)


def test_a_group_may_return_what_it_has_received() -> None:
    sent: list[torch.Tensor] = []
    given = {"a": torch.arange(5), "b": torch.ones(2, 3)}
    described = [(name, (tensor.shape, tensor.dtype)) for name, tensor in given.items()]
    sending, receiving = StoreGroup(0, 2, sent), StoreGroup(1, 2, sent)
    packed_broadcast_producer(iter(given.items()), sending, 0, lambda pair: pair[1], 8, 2)
    got: list[tuple[str, torch.Tensor]] = []
    packed_broadcast_consumer(iter(described), receiving, 0, got.extend, 8, 2)
    assert [name for name, _ in got] == ["a", "b"]
    assert all(torch.equal(tensor, given[name]) for name, tensor in got)
    packed_broadcast_producer(iter(given.items()), sending, 0, lambda pair: pair[1], 8, 2)
    with pytest.raises(TransferError, match="returned 40 bytes where 64 were expected"):
        packed_broadcast_consumer(iter([("a", ((8,), torch.int64))]), receiving, 0, print, 8, 2)


def test_a_group_may_return_work_that_is_under_way() -> None:
    class Late(Work):
        """Done when it is waited for."""

        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__()
            self._tensor = tensor

        def wait(self, timeout: object = None) -> bool:
            self._tensor.fill_(7)
            return True

    class Async(Bare):
        def broadcast(self, tensor: torch.Tensor, src: int) -> Late:
            return Late(tensor)

    got: list[tuple[str, torch.Tensor]] = []
    described = [("a", ((3,), torch.uint8))]
    packed_broadcast_consumer(iter(described), Async(), 0, got.extend, 8, 2, "cpu")
    assert [tensor.tolist() for _, tensor in got] == [[7, 7, 7]]


def test_a_group_that_only_the_caller_and_the_pair_hold_stays() -> None:
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, datetime.timedelta(seconds=20))
    communicator, held = communicator_of(group), weakref.ref(group)
    del group
    gc.collect()
    communicator.broadcast(torch.arange(4), 0)
    del communicator
    gc.collect()
    assert held() is None


# One process imports torch and forks, before torch has a thread.
THREE_RANKS = """
import datetime, os, sys
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world
from packcast.errors import UsageError
from packcast.packed.communicator import communicator_of
from packcast.packed.compat import packed_broadcast_consumer, packed_broadcast_producer
from packcast.packed.replay import ReplayReceiver, ReplaySender

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

def refused(call):
    try:
        call()
    except UsageError as error:
        return str(error)
    raise AssertionError("not refused")

def replay(group, src, sender):
    weights = {"a": torch.full((5,), 3.0), "b": torch.arange(3)}
    if rank == sender:
        ReplaySender(weights, group, src).send(weights)
        return
    got = ReplayReceiver(group, src).receive()
    assert all(torch.equal(got[name], weights[name]) for name in weights), got

def both(group, src, sender):
    transfer(group, src, sender)
    replay(group, src, sender)

TIMEOUT = datetime.timedelta(seconds=30)

def of_helper(name, ranks):
    # As several trainers make theirs, with ranks of its own.
    if rank not in ranks:
        return None
    group, _ = _new_process_group_helper(
        len(ranks), ranks.index(rank), [], Backend("gloo"), dist.PrefixStore(name, store),
        group_name=name, timeout=TIMEOUT)
    if name != "unknown":
        _world.pg_group_ranks[group] = {i: i for i in range(len(ranks))}
    return group

def stateless(name, ranks):
    # As an engine makes one: torch's tables never hear of it.
    if rank not in ranks:
        return None
    mine = dist.PrefixStore(name, store), ranks.index(rank), len(ranks)
    group = dist.ProcessGroup(*mine)
    kind = dist.ProcessGroup.BackendType.GLOO
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, dist.ProcessGroupGloo(*mine, TIMEOUT))
    return group

def backend(name, ranks):
    if rank not in ranks:
        return None
    mine = dist.PrefixStore(name, store), ranks.index(rank), len(ranks)
    return dist.ProcessGroupGloo(*mine, TIMEOUT)

def foreign_groups(when):
    # The last rank of all is 2, not below the size of a group of two.
    for make in (of_helper, stateless, backend):
        for ranks in ([1, 2], [2, 0]):
            group = make(f"{when}{make.__name__}{ranks}", ranks)
            if group is None:
                continue
            mine = communicator_of(group)
            assert (mine.rank, mine.world_size) == (ranks.index(rank), 2)
            assert mine.device == torch.device("cpu")
            for src in (0, 1):
                both(group, src, ranks[src])

try:
    store = dist.FileStore(sys.argv[1], 3)
    foreign_groups("before")
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    foreign_groups("beside")
    unknown = of_helper("unknown", [2, 1])
    if rank:
        transfer(unknown, 0, 2)
    transfer(dist.group.WORLD, src=2, sender=2)
    part = dist.new_group([2, 1])
    if rank:
        mine = communicator_of(part)
        assert mine.world_size == 2
        for src in (0, 1):
            sender = dist.get_global_rank(part, src)
            assert mine.rank == dist.get_group_rank(part, rank)
            transfer(part, src, sender)
        # The global rank of the one that sends is not its rank within the group.
        sender = dist.get_global_rank(part, 0)
        assert sender == 1, "torch sorts the ranks"
        said = refused(lambda: transfer(part, src=1, sender=sender))
        said += refused(lambda: replay(part, src=1, sender=sender))
        assert said.count("src is 1, but") == 2, said
    dist.barrier()
    dist.destroy_process_group()
except BaseException:
    import traceback
    traceback.print_exc()
    end(1)
else:
    end(0)
"""


def test_src_is_the_rank_within_the_group_whoever_made_it(tmp_path: Path) -> None:
    ran = run_warm(THREE_RANKS, tmp_path / "store")
    assert ran.stdout == "ended [0, 0, 0]\n", ran.stderr
