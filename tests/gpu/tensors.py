"""One rank of the tests of tensors received on the device: every way, every value compared.

Run by torchrun, one rank per GPU: `tensors FOLDER ROUNDS`. `test_tensors.py` does. Without a GPU it
runs the same over gloo. The process has a default group of its own all along, as a trainer has.
Exits 1 if anything was wrong on any rank.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import packcast
from packcast.report import Report
from tests.gpu.api import Rank, Tensors, spoil, values

MIB = 1 << 20
NOT_IN_SAFETENSORS = (torch.complex128,)
MODEL_NBYTES = 512 * MIB


def make_checkpoint(folder: Path) -> None:
    """Two shards: many small tensors of every dtype, and some that need several chunks."""
    generator = torch.Generator().manual_seed(7)
    small = {
        name: tensor for name, tensor in values(3).items() if tensor.dtype not in NOT_IN_SAFETENSORS
    }
    large = {f"large.{i}": torch.randn(3 * MIB + i, generator=generator) for i in range(3)}
    large["turned"] = torch.randn(700, 900, generator=generator)
    save_file(small, folder / "model-00001-of-00002.safetensors")
    save_file(large, folder / "model-00002-of-00002.safetensors")


def check_report(me: Rank, report: Report) -> None:
    want = "nccl" if torch.cuda.is_available() else "gloo"
    if report.backend != want or not report.ok:
        me.say_wrong(f"over {report.backend} instead of {want}")
    # The ring, tables of sums and tensors on their way; not the model beside them.
    if report.peak_device_nbytes > MODEL_NBYTES // 2:
        me.say_wrong(f"took {report.peak_device_nbytes} bytes of its device")
    if report.peak_device_nbytes < (report.buffer_size if want == "nccl" else 0):
        me.say_wrong(f"took {report.peak_device_nbytes} bytes, which is no ring")


def handed_out(me: Rank, want: Tensors) -> None:
    """Each tensor is used on a busy stream and spoilt at once; its memory comes back."""
    got: Tensors = {}

    def take(name: str, tensor: torch.Tensor) -> None:
        if (tensor.device.type == "cuda") != torch.cuda.is_available():
            me.say_wrong(f"{name} is on {tensor.device}")
        me.delay()
        got[name] = tensor.clone()
        spoil({name: tensor})

    with me.on_a_stream():
        report = packcast.receive_checkpoint(on_tensor=take)
        me.synchronize()
        order = {name: got[name] for name in want if name in got}
        me.compare(order, want, "handed out")
    check_report(me, report)


def received_into(me: Rank, want: Tensors) -> None:
    """Into tensors that the caller's stream is still busy with; one is not contiguous."""
    with me.on_a_stream():
        into = {name: torch.empty_like(tensor, device=me.device) for name, tensor in want.items()}
        into["turned"] = torch.empty(900, 700, device=me.device).t()
        me.delay()
        spoil(into)
        report = packcast.receive_checkpoint(into=into)
        me.compare(into, want, "received into")
    check_report(me, report)


def refused(me: Rank, folder: Path) -> None:
    """A callback that raises ends all ranks, by name, and the processes go on."""

    def refuse(name: str, tensor: torch.Tensor) -> None:
        raise ValueError(f"I do not want {name}")

    try:
        if me.rank == 0:
            packcast.send_checkpoint(folder, buffer_size=MIB, num_buffers=2)
        else:
            packcast.receive_checkpoint(on_tensor=refuse if me.rank == 1 else lambda *_: None)
        me.say_wrong("nothing was raised")
    except ValueError:
        if me.rank != 1:
            me.say_wrong("another rank's error was raised here")
    except packcast.TransferError as error:
        if me.rank == 1 or "rank 1 (" not in str(error):
            me.say_wrong(f"raised {error}")


def main(where: str, rounds: str) -> int:
    """All ways, `rounds` times."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    folder = Path(where)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    me = Rank(rank, dist.get_world_size(), device, random.Random(rank))
    if rank == 0:
        make_checkpoint(folder)
    dist.barrier()
    model = torch.empty(
        MODEL_NBYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device
    )
    want: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        want |= load_file(shard)
    for round in range(int(rounds)):
        num_buffers, buffer_size = 1 + round % 3, (1, 2, 16)[round % 3] * MIB
        for receive in (handed_out, received_into):
            if rank == 0:
                ring = {"buffer_size": buffer_size, "num_buffers": num_buffers}
                check_report(me, packcast.send_checkpoint(folder, **ring))
            else:
                receive(me, want)
        refused(me, folder)
    verdict = "right" if not me.wrong else "WRONG"
    print(f"rank {rank} {verdict} after {rounds} rounds\n", end="", flush=True)
    wrong = torch.tensor([me.wrong])
    dist.all_reduce(wrong)
    dist.destroy_process_group()
    del model  # which has been there all the time
    return int(wrong.item() > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
