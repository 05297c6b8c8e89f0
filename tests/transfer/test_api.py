"""The library's whole transfers: where the bytes go, and what is raised on whom."""

from __future__ import annotations

import inspect
import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from packcast import (
    CheckpointError,
    DestinationError,
    PackcastError,
    TransferError,
    UsageError,
    VerificationError,
    receive_checkpoint,
    send_checkpoint,
)
from packcast.checkpoint.header import read_header
from packcast.checkpoint.tensor_table import DTYPE_BITS
from packcast.report import Report
from packcast.settings import Settings
from packcast.units import MIB
from tests.helpers.checkpoints import same_tree, sharded, write_safetensors
from tests.helpers.commands import eventually
from tests.helpers.dtypes import UNKNOWN_TO_TORCH, every_torch_dtype
from tests.helpers.library import TOKEN, Address, Receiver, failed, succeeded, transfer
from tests.helpers.wrapper import Wrapper

Tensors = dict[str, torch.Tensor]
Mode = Callable[[], AbstractContextManager[object]]


def to(**arguments: object) -> Receiver:
    """A receiver with these arguments."""
    return partial(receive_checkpoint, token=TOKEN, **arguments)


@pytest.mark.parametrize("function", [send_checkpoint, receive_checkpoint])
def test_the_librarys_default_heartbeat_timeout_is_longer(
    function: Callable[..., Report],
) -> None:
    assert inspect.signature(function).parameters["heartbeat_timeout_s"].default == 30.0
    assert Settings(command="send").heartbeat_timeout_s == 3.0


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.flatten()  # not a clone, which would make a bool's byte 0 or 1
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


@pytest.fixture
def left_threads() -> Callable[[], list[str]]:
    """Lists packcast's threads that this test has started.

    A test that failed while it connected may have left one stuck in gloo's connect.
    """
    others = set(threading.enumerate())
    return lambda: [
        thread.name
        for thread in set(threading.enumerate()) - others
        if thread.name.startswith("packcast")
    ]


class Net(torch.nn.Module):
    """A model with two names for one memory, and one weight that is not contiguous."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Embedding(300, 64)
        self.mix = torch.nn.Linear(64, 64)
        self.mix.weight = torch.nn.Parameter(torch.empty(64, 64).t())
        self.head = torch.nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(seed))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(torch.tanh(self.mix(self.embed(tokens))))
        return hidden


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Net, Path]:
    """A model and its checkpoint, which has the tied weight once."""
    net, path = Net(seed=1), tmp_path / "net" / "model.safetensors"
    path.parent.mkdir()
    state = {name: t.contiguous() for name, t in net.state_dict().items() if name != "head.weight"}
    save_file(state, path)
    return net, path.parent


def test_two_workers_have_identical_copies_and_nothing_is_left_behind(
    tmp_path: Path, left_threads: Callable[[], list[str]]
) -> None:
    checkpoint = sharded(tmp_path / "c", 3, 2_000_000)
    before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    reports = succeeded(
        transfer(checkpoint, to(out=tmp_path / "1"), to(out=f"{tmp_path}/{{rank}}", rank=2))
    )
    same_tree(checkpoint, tmp_path / "1")
    same_tree(checkpoint, tmp_path / "2")
    assert [report.rank for report in reports] == [0, 1, 2]
    assert reports[0].is_sender
    assert reports[0].workers.keys() == {1, 2}
    assert len({tuple(report.digests.items()) for report in reports}) == 1
    after = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert after == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert not dist.is_initialized()
    assert left_threads() == []


@pytest.mark.parametrize("buffer_size", [MIB, 64 * MIB])
def test_every_tensor_is_handed_out_once_whole_and_in_the_calling_thread(
    tmp_path: Path, buffer_size: int
) -> None:
    tensors = every_torch_dtype()
    path = tmp_path / "c" / "m.safetensors"
    write_safetensors(path, tensors, pad=3)
    got: list[tuple[str, torch.Tensor, int]] = []

    def receiver(address: Address) -> object:
        me = threading.get_ident()
        report = receive_checkpoint(
            address,
            token=TOKEN,
            on_tensor=lambda name, tensor: got.append((name, tensor, threading.get_ident())),
        )
        assert {ident for _, _, ident in got} == {me}
        return report

    succeeded(transfer(path, receiver, buffer_size=buffer_size))
    header, data = read_header(path), path.read_bytes()
    assert sorted(name for name, _, _ in got) == sorted(tensors)
    for name, tensor, _ in got:
        (entry,) = (t for t in header.tensors if t.name == name)
        assert raw(tensor) == data[entry.begin : entry.end], name
        assert tensor.shape == entry.shape
        assert tensor.dtype.itemsize * 8 == DTYPE_BITS[entry.dtype]
    kinds = {name: tensor.dtype for name, tensor, _ in got}
    assert kinds["all.BF16"] == torch.bfloat16
    assert kinds["all.F16"] == torch.float16
    assert kinds["all.U16"] == torch.uint16
    assert kinds["all.F8_E4M3"] == torch.float8_e4m3fn
    assert kinds["all.BOOL"] == torch.bool


def test_a_source_that_is_rewritten_with_its_times_set_back_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {f"t{i:02}": ("U8", (MIB,)) for i in range(24)})
    before, rewritten = path.stat(), threading.Event()

    def rewrite(name: str, tensor: torch.Tensor) -> None:
        if not rewritten.is_set():
            rewritten.set()
            with path.open("r+b") as file:  # the end, which is not read yet
                file.seek(-10, os.SEEK_END)
                file.write(b"new weight")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    errors = failed(transfer(path, to(on_tensor=rewrite)))
    assert rewritten.is_set()
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert "m.safetensors changed while it was being sent" in error.message
        assert "its time set back" in error.message


def test_what_is_handed_out_is_the_callers_own(tmp_path: Path) -> None:
    save_file({"a": torch.randn(100), "b": torch.randn(100)}, tmp_path / "m.safetensors")
    got: Tensors = {}

    def spoil(name: str, tensor: torch.Tensor) -> None:
        got[name] = tensor.clone()
        tensor.fill_(-1)

    succeeded(transfer(tmp_path / "m.safetensors", to(on_tensor=spoil)))
    want = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_model_received_into_computes_what_the_sent_one_does(
    trained: tuple[Net, Path],
) -> None:
    net, checkpoint = trained
    theirs = Net(seed=2)
    tokens = torch.randint(0, 300, (5, 7))
    assert not torch.equal(theirs(tokens), net(tokens))
    succeeded(transfer(checkpoint, to(into=theirs.state_dict())))
    assert torch.equal(theirs(tokens), net(tokens))
    assert theirs.steps == 1
    assert not theirs.mix.weight.is_contiguous()


def test_a_model_built_from_what_is_handed_out_does_too(trained: tuple[Net, Path]) -> None:
    net, checkpoint = trained
    theirs, tokens = Net(seed=2), torch.randint(0, 300, (5, 7))
    state = theirs.state_dict()
    succeeded(transfer(checkpoint, to(on_tensor=lambda name, t: state[name].copy_(t))))
    assert torch.equal(theirs(tokens), net(tokens))


def lose(name: str) -> Callable[[Tensors], object]:
    return lambda state: state.pop(name)


def free(name: str) -> Callable[[Tensors], object]:
    return lambda state: state[name].untyped_storage().resize_(0)


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lose("mix.bias"), r"mix.bias of model.safetensors is not in into"),
        (put("extra", torch.ones(3)), r"tensor extra of into is not in the checkpoint"),
        (put("mix.bias", torch.ones(63)), r"mix.bias is torch.float32 \(63,\) in into"),
        (put("mix.bias", torch.ones(64).half()), r"mix.bias is torch.float16 \(64,\) in into"),
        (put("mix.bias", torch.ones(64, device="meta")), r"mix.bias is on the meta device"),
        (put("mix.bias", torch.ones(1).expand(64)), r"mix.bias cannot .* elements of it share"),
        (put("mix.bias", Wrapper(torch.ones(64))), r"mix.bias is a Wrapper"),
        (free("mix.bias"), r"mix.bias has lost its memory: its storage has 0 bytes, of 256"),
        (free("mix.weight"), r"mix.weight has lost its memory: its storage has 0 bytes"),
        (
            lambda state: state.update({"mix.bias": state["mix.weight"].t()[0]}),
            r"mix.\w+ cannot be received into: part of it shares the memory of mix.\w+",
        ),
        (put("mix.bias", torch.nn.UninitializedBuffer()), r"mix.bias is a lazy parameter"),
        (put("extra", torch.nn.UninitializedBuffer()), r"extra is a lazy parameter"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_any_is_touched(
    trained: tuple[Net, Path], change: Callable[[Tensors], object], says: str
) -> None:
    state = {name: tensor.clone() for name, tensor in Net(seed=2).state_dict().items()}
    state["head.weight"] = state["embed.weight"]
    change(state)
    before = {name: tensor.clone() for name, tensor in state.items() if is_whole(tensor)}
    errors = failed(transfer(trained[1], to(into=state, device="cpu")))
    for error in errors:
        assert isinstance(error, UsageError)
    with pytest.raises(UsageError, match=says):
        raise errors[1]
    assert "rank 1 (" in str(errors[0])
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), name


def is_whole(tensor: torch.Tensor) -> bool:
    """May its values be looked at?"""
    if type(tensor) is not torch.Tensor or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() > 0


@pytest.mark.parametrize("made_in", [torch.inference_mode, nullcontext])
@pytest.mark.parametrize("received_in", [torch.inference_mode, nullcontext])
def test_tensors_made_in_one_mode_are_received_into_in_another(
    trained: tuple[Net, Path], made_in: Mode, received_in: Mode
) -> None:
    net, checkpoint = trained
    with made_in():
        theirs = Net(seed=2)
        state = theirs.state_dict()

    def receiver(address: Address) -> Report:
        with received_in():
            return receive_checkpoint(address, token=TOKEN, into=state)

    succeeded(transfer(checkpoint, receiver))
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_autograd_notices_that_tensors_were_received_into(trained: tuple[Net, Path]) -> None:
    theirs = Net(seed=2)
    state = theirs.state_dict()
    scale = torch.ones((), requires_grad=True)
    graphs = {name: (tensor * scale).sum() for name, tensor in state.items()}
    succeeded(transfer(trained[1], to(into=state)))
    for graph in graphs.values():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()


def test_without_strict_only_what_both_have_is_received(trained: tuple[Net, Path]) -> None:
    net, checkpoint = trained
    state = {"mix.bias": torch.zeros(64), "extra": torch.full((3,), 7.0)}
    succeeded(transfer(checkpoint, to(into=state, strict=False)))
    assert torch.equal(state["mix.bias"], net.mix.bias)
    assert state["extra"].tolist() == [7, 7, 7]


@pytest.mark.parametrize("dtype", UNKNOWN_TO_TORCH)
def test_a_dtype_that_torch_has_not_is_named_before_any_byte_moves(
    tmp_path: Path, dtype: str
) -> None:
    tensors = {"fine": ("F32", (4,)), "small": (dtype, (4, 8))}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    got: list[str] = []
    errors = failed(
        transfer(tmp_path / "m.safetensors", to(on_tensor=lambda name, _: got.append(name)))
    )
    assert all(isinstance(error, UsageError) for error in errors), errors
    assert all(f"tensor small in m.safetensors is {dtype}" in str(error) for error in errors)
    assert got == []


@pytest.fixture
def reused(tmp_path: Path) -> Path:
    """A checkpoint with an old copy of b, a tensor x beside the index, and an original/ of it."""
    folder = tmp_path / "reused"
    (folder / "original").mkdir(parents=True)
    one = torch.ones(2)
    save_file({"a": one, "b": one * 2}, folder / "model-1.safetensors")
    save_file({"b": one * 99, "c": one * 3, "x": one * 4}, folder / "model-2.safetensors")
    save_file({"a": one * 98, "block.b": one * 2}, folder / "original" / "model.safetensors")
    weight_map = {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def values(tensors: Tensors) -> dict[str, float]:
    return {name: float(tensor[0]) for name, tensor in tensors.items()}


def test_an_old_copy_of_a_tensor_is_not_handed_out_but_its_file_travels_whole(
    reused: Path, tmp_path: Path
) -> None:
    got: list[tuple[str, float]] = []
    reports = succeeded(
        transfer(
            reused,
            to(on_tensor=lambda name, tensor: got.append((name, float(tensor[0])))),
            to(out=tmp_path / "copy"),
        )
    )
    assert sorted(got) == [("a", 1.0), ("b", 2.0), ("block.b", 2.0), ("c", 3.0), ("x", 4.0)]
    same_tree(reused, tmp_path / "copy")
    (counted,) = (w for w in reports[0].warnings if "in another shard too" in w)
    assert counted.startswith("2 tensors are in another shard too, which the index names instead")
    assert any(
        w.startswith("2 tensors left out") for w in [*reports[1].warnings, *reports[2].warnings]
    )


def test_strict_takes_the_tensors_of_the_index_and_no_others(reused: Path) -> None:
    state = {name: torch.zeros(2) for name in "abc"}
    succeeded(transfer(reused, to(into=state)))
    assert values(state) == {"a": 1.0, "b": 2.0, "c": 3.0}
    state["x"] = torch.zeros(2)
    errors = failed(transfer(reused, to(into=state)))
    assert "tensor x of into is in the checkpoint, but not in its index" in str(errors[1])
    succeeded(transfer(reused, to(into=state, strict=False)))
    assert values(state) == {"a": 1.0, "b": 2.0, "c": 3.0, "x": 4.0}


def test_one_name_in_two_shards_is_handed_out_twice_but_cannot_be_received_into(
    tmp_path: Path,
) -> None:
    for folder in ("unet", "vae"):
        write_safetensors(tmp_path / folder / "m.safetensors", {"w": ("F32", (4,))})
    got: list[str] = []
    reports = succeeded(transfer(tmp_path, to(on_tensor=lambda name, _: got.append(name))))
    assert got == ["w", "w"]
    [warning] = reports[1].warnings
    assert warning.startswith("1 tensor is in several shards, as 'w', and no index says")
    errors = failed(transfer(tmp_path, to(into={"w": torch.zeros(4)})))
    assert "tensor w is in two shards" in str(errors[1])


def test_a_difference_raises_with_the_report_and_stops_no_other_copy(tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "c", 2, 1_000_000)
    other = sharded(tmp_path / "other", 2, 1_000_000, seed=5)
    sender, checker, writer = transfer(
        checkpoint, to(verify=other, rank=1), to(out=tmp_path / "out", rank=2)
    )
    for error in (sender, checker):
        assert isinstance(error, VerificationError)
        assert "differs at byte" in str(error)
        assert error.report is not None
        assert error.report.exit_code == 6
    assert isinstance(sender, PackcastError)
    assert sender.report is not None
    assert sender.report.workers[1]["equal"] is False
    assert not isinstance(writer, BaseException)
    same_tree(checkpoint, tmp_path / "out")


def test_a_refusal_is_raised_on_every_rank(
    tmp_path: Path, left_threads: Callable[[], list[str]]
) -> None:
    checkpoint = sharded(tmp_path / "c", 2, 1000)
    there = sharded(tmp_path / "there", 1, 1000)
    errors = failed(transfer(checkpoint, to(out=there, rank=1), to(out=tmp_path / "new", rank=2)))
    assert all(isinstance(error, DestinationError) for error in errors), errors
    assert all(f"{there} exists and is not empty" in str(error) for error in errors)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))
    eventually(lambda: not left_threads(), "the threads' end")


def test_what_the_callback_raises_ends_every_rank_and_is_raised_on_its_own(
    tmp_path: Path, left_threads: Callable[[], list[str]]
) -> None:
    checkpoint = sharded(tmp_path / "c", 3, 3_000_000)

    def refuse(name: str, tensor: torch.Tensor) -> None:
        raise ValueError(f"I do not want {name}")

    sender, mine, other = failed(
        transfer(checkpoint, to(on_tensor=refuse, rank=1), to(out=tmp_path / "out", rank=2))
    )
    assert isinstance(mine, ValueError)
    for error in (sender, other):
        assert isinstance(error, TransferError)
        assert "rank 1 (" in str(error)
        assert "I do not want layer.1.0" in str(error)
    assert os.listdir(tmp_path) == ["c"]
    eventually(lambda: not left_threads(), "the threads' end")
    # And all of them can be used again.
    succeeded(transfer(checkpoint, to(discard=True), to(out=tmp_path / "out")))
    same_tree(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "no workers to send to"),
        ({"out": "a", "verify": "b"}, "only one of out or verify"),
        ({"out": "a-{ranks}"}, r"out: \{ranks\} is not a placeholder"),
        ({"in_place": True, "verify": "b"}, "in_place needs out"),
        ({"workers": 2}, "workers= needs listen="),
        ({"listen": ("h", 1)}, "listen= needs workers="),
        ({"workers": 0, "listen": ("h", 1)}, "workers: must be at least 1, not 0"),
        ({"workers": 1, "listen": "h:1"}, r"listen: 'h:1' is not \(host, port\)"),
        ({"workers": 1, "listen": ("h", 99999)}, "listen"),
        ({"workers": 1, "listen": ("h", 1)}, "workers= needs token="),
        ({"workers": 1, "listen": ("h", 1), "token": b""}, "token: a token must have 1"),
        ({"buffer_size": 1000}, "buffer_size: 1000 is too small"),
        ({"buffer_size": MIB + 1}, "not a multiple"),
        ({"num_buffers": 0}, "0 buffers"),
        ({"staging": MIB}, "staging of 1MiB is less"),
        ({"readers": 0}, "readers: must be .*, not 0"),
        ({"readers": "some"}, "readers: must be .*, not 'some'"),
        ({"backend": "mpi"}, "backend: 'mpi'"),
        ({"device": "gpu"}, "device: 'gpu' is not one of"),
        ({"include": "model.*"}, "include: give a list"),
        ({"join_timeout_s": 0}, "join_timeout_s: must be greater than 0, not 0 s"),
        ({"stall_timeout_s": float("nan")}, "stall_timeout_s"),
        ({"port_range": (29400, 29399)}, "port_range: 29400-29399 is not a range"),
        ({"port_range": "29400-29409"}, r"port_range: '29400-29409' is not \(first, last\)"),
        ({"port": 5, "workers": 1, "listen": ("h", 1)}, "port= is only for Slurm"),
        ({"port": 70_000}, "port: must be at most 65535"),
    ],
)
def test_invalid_arguments_are_refused_at_once(
    arguments: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACKCAST_TOKEN", raising=False)
    with pytest.raises(UsageError, match=says):
        send_checkpoint("nowhere", **arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "one of out, verify, into, on_tensor or discard"),
        ({"discard": True}, "no address of the sender"),
        ({"discard": True, "into": {}}, "only one of"),
        ({"discard": True, "in_place": True}, "in_place needs out"),
        ({"address": ("h", 0), "discard": True}, "port 0"),
        ({"address": ("h", 1), "verify": ""}, "verify: the path is empty"),
        ({"address": ("h", 1), "out": "x", "heartbeat_timeout_s": -1}, "heartbeat_timeout_s"),
    ],
)
def test_invalid_arguments_of_a_receiver_are_refused_at_once(
    arguments: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        receive_checkpoint(**arguments)


def test_a_bad_checkpoint_is_raised_before_anybody_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(PackcastError, match="nowhere"):
        send_checkpoint(tmp_path / "nowhere", workers=1, listen=("127.0.0.1", 0), token=TOKEN)


@pytest.mark.parametrize("master", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}])
def test_an_explicit_address_goes_before_a_launchers_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, master: dict[str, str]
) -> None:
    # As in a worker that has a rank in its engine's group, or a trainer under torchrun.
    for name, value in ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | master).items():
        monkeypatch.setenv(name, value)
    checkpoint = sharded(tmp_path / "model", 1, 10_000)
    out = tmp_path / "copy-{local_rank}"
    reports = succeeded(
        transfer(checkpoint, lambda address: receive_checkpoint(address, token=TOKEN, out=out))
    )
    assert [report.rank for report in reports] == [0, 1]
    same_tree(checkpoint, tmp_path / ("copy-1" if master else "copy-0"))


@pytest.mark.parametrize("host", ["node..1", "a" * 70, "tcp://node1", ""])
def test_a_name_that_no_host_can_have_is_refused_at_once(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match=r"address: .* names no host"):
        receive_checkpoint((host, 1), token=TOKEN, discard=True)
    with pytest.raises(UsageError, match=r"listen: .* names no host"):
        send_checkpoint(tmp_path, workers=1, listen=(host, 1), token=TOKEN)
