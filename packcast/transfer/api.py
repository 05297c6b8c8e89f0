"""The Python API: `send_checkpoint` and `receive_checkpoint`.

Typed arguments -> settings -> one call of `run`, as on the command line; but the end of a transfer
is raised as an error here, and never ends the process.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch

from packcast.errors import UsageError, error_from_code
from packcast.io.sinks.tensor_destination import GivenTensors, NewTensors, TensorDestination
from packcast.launch import validation
from packcast.launch.secret import token_of
from packcast.report import Report
from packcast.settings import (
    DEFAULT_JOIN_TIMEOUT_S,
    DEFAULT_LIBRARY_HEARTBEAT_TIMEOUT_S,
    DEFAULT_NUM_BUFFERS,
    DEFAULT_STAGING,
    DEFAULT_STALL_TIMEOUT_S,
    Backend,
    Settings,
)
from packcast.transfer.background import BackgroundTransfer, TensorQueue
from packcast.transfer.ends import MakeDestination
from packcast.transfer.run import run
from packcast.view import View

AnyPath: TypeAlias = "str | os.PathLike[str]"

_WAYS = "under torchrun, Slurm or mpirun every rank calls this; elsewhere say workers= and listen="
_WHERE = "say address=(host, port), where send_checkpoint(..., listen=(host, port)) waits"

_calls = itertools.count()  # alike on all ranks of a launch, as the calls are


def send_checkpoint(
    checkpoint: AnyPath,
    *,
    out: AnyPath | None = None,
    verify: AnyPath | None = None,
    force: bool = False,
    in_place: bool = False,
    sidecars: bool = True,
    all_files: bool = False,
    follow_links: bool = False,
    exclude_files: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    readers: int | Literal["all"] = 1,
    max_rate: float | str | None = None,
    buffer_size: int | None = None,
    num_buffers: int = DEFAULT_NUM_BUFFERS,
    staging: int = DEFAULT_STAGING,
    backend: Backend = "auto",
    device: str = "auto",
    workers: int | None = None,
    listen: tuple[str, int] | None = None,
    port: int | None = None,
    port_range: tuple[int, int] | None = None,
    token: str | bytes | None = None,
    join_timeout_s: float = DEFAULT_JOIN_TIMEOUT_S,
    heartbeat_timeout_s: float = DEFAULT_LIBRARY_HEARTBEAT_TIMEOUT_S,
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
    view: View | None = None,
) -> Report:
    """Send a safetensors checkpoint (a file or a directory) to every other rank of the group.

    The group is that of torchrun, Slurm or mpirun, by this process's environment; every rank calls
    this or `receive_checkpoint`, equally often. The lowest rank that calls this is the sender;
    other ranks that do are workers: they write to `out` (with {rank}, {local_rank} and {host}
    filled in), compare with `verify`, or with neither check what comes and drop it. Without a
    launcher the sender waits for `workers` receivers at `listen`, a host and a port; all need one
    `token`, here or in PACKCAST_TOKEN.

        from packcast import send_checkpoint

        report = send_checkpoint("model", workers=2, listen=("node1", 29400), token="7b1f09c4d2a8")
        print(report.num_tensors, "tensors at", report.bytes_per_second / 1e9, "GB/s")

    The arguments are the options of `packcast send`: sizes in bytes (`buffer_size` goes by the
    checkpoint's if it is None), times in seconds, `exclude_files` globs over the
    names of files and folders, `include` and `exclude` globs over tensor names,
    `readers` how many of the ranks that call this read the checkpoint and share the sending,
    `max_rate` bytes per second, or a text such as "2GB/s".
    `view` receives updates, on a thread of the transfer.

    Returns when every worker has a verified, published copy. This makes a process group of its own
    and closes it; an existing one is not used. The bytes move on threads;
    the calling thread, which may be any, waits.

    Raises, on every rank and with one sentence, within the bounds of the command line: UsageError
    for invalid arguments (here only), CheckpointError, RendezvousError, TransferError
    (a lost rank, damage, a stall), DestinationError; VerificationError where a worker's comparison
    found a difference, on that worker and on the sender. The error of a transfer that reached its
    end has its `report`. KeyboardInterrupt is raised after the other ranks were notified; after the
    point of no return only at the end. Partial directories are gone by then. No signal handler
    is installed, and `os.environ` is not changed; but while NCCL connects, TORCH_NCCL_* and
    NCCL_SOCKET_IFNAME variables are in the process's environment, where a program that is started
    just then inherits them: torch and NCCL read them from nowhere else. After a failure in
    mid-transfer the group may stay behind in the background, with its buffers: gloo's until its
    connections end, or a minute after the stall timeout; NCCL's until its abort is done. New
    transfers work all the same.
    """
    call = next(_calls)
    settings = validation.settings_of(
        "send",
        str,
        checkpoint=checkpoint,
        out=_text(out),
        verify=_text(verify),
        force=force,
        in_place=in_place,
        sidecars=sidecars,
        all_files=all_files,
        follow_links=follow_links,
        exclude_files=exclude_files,
        include=include,
        exclude=exclude,
        readers=readers,
        max_rate=max_rate,
        buffer_size=buffer_size,
        num_buffers=num_buffers,
        staging=staging,
        backend=backend,
        device=device,
        workers=workers,
        address=listen,
        port=port,
        port_range=port_range,
        token=token_of(token, os.environ, view.warn if view else None),
        join_timeout_s=join_timeout_s,
        heartbeat_timeout_s=heartbeat_timeout_s,
        stall_timeout_s=stall_timeout_s,
    )
    launch = validation.launch_of(os.environ, by_address=settings.by_address)
    validation.check_send(settings, launch, "{}=".format, nproc=None, hint=_WAYS)
    if workers is not None and settings.token is None and view is None:
        raise UsageError(
            "workers= needs token=, which the workers give too",
            hint="or set PACKCAST_TOKEN, or give a view, which is shown one",
        )
    return _transfer(BackgroundTransfer(), settings, view, call)


def receive_checkpoint(
    address: tuple[str, int] | None = None,
    *,
    out: AnyPath | None = None,
    verify: AnyPath | None = None,
    into: Mapping[str, torch.Tensor] | None = None,
    on_tensor: Callable[[str, torch.Tensor], object] | None = None,
    discard: bool = False,
    strict: bool = True,
    force: bool = False,
    in_place: bool = False,
    device: str = "auto",
    rank: int | None = None,
    port: int | None = None,
    token: str | bytes | None = None,
    join_timeout_s: float = DEFAULT_JOIN_TIMEOUT_S,
    heartbeat_timeout_s: float = DEFAULT_LIBRARY_HEARTBEAT_TIMEOUT_S,
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
    view: View | None = None,
) -> Report:
    """Receive what another rank sends with `send_checkpoint`, or `packcast send`.

    Under torchrun, Slurm or mpirun the group is the launcher's; else `address` is where the sender
    listens (it may come later), `token` what it asks for, and `rank` the one to be, if that
    matters. The checkpoint goes to exactly one of

    - `out`: a directory that appears complete and proven, or not at all; `force` replaces an
      earlier copy. {rank}, {local_rank} and {host} are filled in. `in_place` fills the directory
      that is there, file by file, which something else may have mounted.
    - `verify`: a local checkpoint to compare with; a difference raises VerificationError.
    - `into`: tensors by name, to receive in place, as a model's `state_dict()`. Shapes, dtypes and
      devices are compared before a byte moves, and names: `strict=False` takes those that are on
      both sides. A failure in mid-transfer leaves them partly overwritten.
    - `on_tensor(name, tensor)`: called once for every tensor of every shard, in any order,
      with the whole tensor on this rank's device (a GPU, or the CPU over gloo), of the header's
      dtype and shape. It is the caller's own from then on.
    - `discard`: what comes is checked and dropped.

        from packcast import receive_checkpoint

        receive_checkpoint(("node1", 29400), token="7b1f09c4d2a8", into=model.state_dict())

    `device` is auto, cpu, cuda or cuda:N; with `into` auto means the tensors' own. Every tensor is
    proven before `on_tensor` has it: on a CPU by the digests that the reader took of the file's
    bytes, on a GPU by a sum over what left the root's GPU (an accident between its host and its
    GPU would not be seen). Sidecars are checked and dropped. `on_tensor` runs in the calling
    thread; on a GPU the tensor is complete for every stream, and its memory belongs to the stream
    that was current when this was called. While it runs the transfer goes on until finished
    tensors of `staging` bytes wait (the sender's, 100 MiB unless told otherwise), so one that
    takes longer than the stall timeout ends the transfer. What it raises ends it too, and is
    raised here. Beside the tensors this needs the ring (`num_buffers` x `buffer_size`, of the
    sender), on a GPU 16 MiB more and 24 bytes for every tensor or every 64 KiB of one, and for
    `on_tensor` the tensors that wait or are unfinished.

    Returns when the checkpoint is where it belongs and every other rank has said so, or has been
    waited for. Raises as `send_checkpoint` does, and leaves behind what is said there; UsageError,
    also on the sender, where a tensor cannot be received (torch has no F4 and F6 of such shapes).
    """
    call = next(_calls)
    if device == "auto" and into is not None:
        device = _device_of(into)
    settings = validation.settings_of(
        "recv",
        str,
        out=_text(out),
        verify=_text(verify),
        other_destinations={"into": into, "on_tensor": on_tensor, "discard": discard},
        force=force,
        in_place=in_place,
        device=device,
        address=address,
        port=port,
        token=token_of(token, os.environ, view.warn if view else None),
        rank=rank,
        join_timeout_s=join_timeout_s,
        heartbeat_timeout_s=heartbeat_timeout_s,
        stall_timeout_s=stall_timeout_s,
    )
    launch = validation.launch_of(os.environ, by_address=settings.by_address)
    validation.check_recv(settings, launch, "{}=".format, hint=_WHERE)
    caller = BackgroundTransfer()

    def make_destination(device: str, waiting_nbytes: int) -> TensorDestination:
        here = torch.device(device)
        on_gpu = here.type == "cuda"
        stream = caller.ask(lambda: torch.cuda.current_stream(here)) if on_gpu else None
        if into is not None:
            return GivenTensors(here, into, strict=strict, stream=stream)
        assert on_tensor is not None
        return NewTensors(here, TensorQueue(caller, on_tensor, waiting_nbytes), stream)

    to_destination = make_destination if into is not None or on_tensor is not None else None
    return _transfer(caller, settings, view, call, to_destination)


def _transfer(
    caller: BackgroundTransfer,
    settings: Settings,
    view: View | None,
    call: int,
    make_destination: MakeDestination | None = None,
) -> Report:
    view = view or View()
    try:
        report = caller.run(
            lambda: run(settings, view, caller, call=call, make_destination=make_destination)
        )
    finally:
        view.close()
    if not report.ok:
        error = error_from_code(report.exit_code, report.error or "failed", report.hint)
        error.report = report
        raise error
    return report


def _text(path: AnyPath | None) -> str | None:
    return None if path is None else os.fspath(path)


def _device_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Their device, if it is the same for all."""
    devices = {str(tensor.device) for tensor in tensors.values() if hasattr(tensor, "device")}
    one = devices.pop() if len(devices) == 1 else "auto"
    return one if one == "cpu" or one.startswith("cuda") else "auto"
