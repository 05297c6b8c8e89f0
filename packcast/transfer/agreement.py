"""The agreement once all have joined: one checkpoint, the readers, the offer and its answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import xxhash
from pydantic import ValidationError

from packcast.checkpoint.checkpoint import Checkpoint
from packcast.checkpoint.outgoing import FileSpec, OutgoingFile, outgoing_files
from packcast.control.channel import Channel
from packcast.control.client import ControlClient
from packcast.control.frames import ProtocolError
from packcast.control.messages import OfferMessage
from packcast.control.rank_info import RankInfo
from packcast.control.server import ControlServer
from packcast.errors import RendezvousError, TransferError, UsageError
from packcast.io.source import FileReader
from packcast.launch.devices import assign_devices
from packcast.launch.fitting import Fitted, fit_buffers
from packcast.packed.chain_order import chain_order
from packcast.packed.plan import BLOCK, plan_chunks, plan_digest
from packcast.settings import Settings
from packcast.transfer.offer import Offer, Sample, amount_fault, fault_of
from packcast.transfer.protocol import RankAssignment, Ready

NUM_SAMPLES = 16
_DEVICE_START_S = 30.0  # until the first broadcast CUDA and NCCL may hold the interpreter


def check_one_checkpoint(infos: Sequence[RankInfo], sender: RankInfo) -> None:
    """Raise RendezvousError if ranks that ran `send` name different checkpoints.

    If a rank cannot read it (it is on the sender's disk), the paths must be equal.
    """
    for info in infos:
        if info.role != "send":
            continue
        if info.fingerprint and info.fingerprint != sender.fingerprint:
            what = "whose files have other sizes or headers"
        elif not info.fingerprint and info.checkpoint != sender.checkpoint:
            what = "which it cannot read"
        else:
            continue
        raise RendezvousError(
            f"different checkpoints: {sender.label} sends {sender.checkpoint}, but {info.label}"
            f" names {info.checkpoint}, {what}",
            hint="give the same CKPT on all ranks that run `packcast send`",
        )


def choose_readers(
    infos: Sequence[RankInfo], sender: RankInfo, wanted: int | None
) -> tuple[int, ...]:
    """The sender, then the lowest other ranks that ran `send` and can read the checkpoint.

    `wanted` None means every rank that ran `send`. Raises RendezvousError if there are too few.
    """
    others = [m for m in infos if m.role == "send" and m.rank != sender.rank]
    able = [m for m in others if m.fingerprint == sender.fingerprint]
    if wanted is None and len(able) < len(others):
        blind = next(m for m in others if m not in able)
        raise RendezvousError(
            f"--readers all: {blind.label} cannot read {blind.checkpoint}",
            hint="a reader needs the checkpoint where it runs; --readers 1 reads on the sender",
        )
    if wanted is not None and wanted > 1 + len(able):
        raise RendezvousError(
            f"--readers {wanted}: only {1 + len(able)} ranks ran `send` and can read it",
            hint=f"give at most {1 + len(able)}, or `all`",
        )
    count = len(able) if wanted is None else wanted - 1
    return tuple(m.known_rank for m in (sender, *able[:count]))


def make_offers(
    settings: Settings,
    checkpoint: Checkpoint,
    files: Sequence[OutgoingFile],
    infos: Sequence[RankInfo],
    sender: RankInfo,
) -> tuple[dict[int, Offer], Fitted]:
    """One offer for each rank, the sender's own included: the same but for the assignment.

    And the sizes of the buffers, with the reason.
    """
    check_one_checkpoint(infos, sender)
    readers = choose_readers(infos, sender, settings.readers)
    devices = assign_devices(infos, settings.backend)
    sizes = [file.spec.nbytes for file in files]
    fitted = fit_buffers(settings, sum(sizes), infos, devices.devices)
    buffer_size = fitted.sizes.buffer_size
    fault = amount_fault(sum(sizes), buffer_size)
    if fault:
        raise UsageError(fault, hint="try a larger --buffer-size, or send it in parts")
    chunks = plan_chunks(sizes, buffer_size, readers)
    samples = take_samples(checkpoint, files) if len(readers) > 1 else ()
    order = tuple(chain_order([info.boot_id for info in infos]))
    ranks_on = Counter(info.boot_id for info in infos)
    readers_on = Counter(info.boot_id for info in infos if info.rank in readers)
    assignments = [
        RankAssignment(
            rank=rank,
            device=devices.devices[rank],
            ranks_on_host=ranks_on[info.boot_id],
            readers_on_host=max(1, readers_on[info.boot_id]),
        )
        for rank, info in enumerate(infos)
    ]
    try:
        offer = Offer(
            files=tuple(file.spec for file in files),
            buffer_size=buffer_size,
            num_buffers=fitted.sizes.num_buffers,
            staging=fitted.sizes.staging,
            readers=readers,
            chain=() if order == tuple(range(len(infos))) else order,
            plan=plan_digest(sizes, buffer_size, chunks),
            digest="xxh3_128",
            include=settings.include,
            exclude=settings.exclude,
            samples=samples,
            world_size=len(infos),
            backend=devices.backend,
            reason=devices.reason,
            loud=devices.loud,
            assignment=assignments[0],
        )
    except ValidationError as error:  # globs of the command line, above all
        raise UsageError(f"this cannot be offered: {fault_of(error)}") from error
    offers = {
        rank: offer.model_copy(update={"assignment": assignment})
        for rank, assignment in enumerate(assignments)
    }
    return offers, fitted


def send_offers(server: ControlServer, offers: Mapping[int, Offer], sender: int) -> list[int]:
    """Send every worker the offer and its own assignment; returns the workers' ranks."""
    server.broadcast(OfferMessage.of(offers[sender].to_bytes()))
    workers = [rank for rank in offers if rank != sender]
    for rank in workers:
        server.send(rank, offers[rank].assignment)
    _allow_device_start(server, offers[sender])
    return workers


def await_offer(
    client: ControlClient, rank: int, world_size: int, timeout_s: float | None
) -> Offer:
    """The sender's offer for this rank; TransferError if it is not valid."""
    message = client.expect(OfferMessage, timeout_s)
    assignment = client.expect(RankAssignment, timeout_s)
    try:
        content = message.content()
    except ProtocolError as error:
        raise TransferError(f"the sender's offer is refused: {error}") from error
    offer = Offer.from_bytes(content, assignment)
    if (offer.rank, offer.world_size) != (rank, world_size):
        raise TransferError("the sender's offer is for another rank or group")
    check_device(offer)
    _allow_device_start(client, offer)
    return offer


def _allow_device_start(channel: Channel, offer: Offer) -> None:
    if offer.backend == "nccl":
        channel.be_patient(_DEVICE_START_S)


def await_ready(server: ControlServer, offer: Offer, timeout_s: float) -> bool:
    """Wait until every worker has reserved its space and buffers, and has made the same plan.

    Returns whether a worker needs the chunks' sums, since its bytes stay on the device.
    """
    answers = server.gather(Ready, timeout_s)
    for rank, ready in answers.items():
        if ready.plan != offer.plan:
            raise TransferError(f"rank {rank} makes another plan of the offer")
    return any(ready.sums for ready in answers.values())


def take_samples(checkpoint: Checkpoint, files: Sequence[OutgoingFile]) -> tuple[Sample, ...]:
    """Digests of a few blocks, drawn at random, for the other readers to compare with."""
    places = [(i, file.spec.nbytes) for i, file in enumerate(files) if file.spec.nbytes]
    reader = FileReader(files, checkpoint.files)
    samples = []
    for file, size in random.choices(places, [n for _, n in places], k=NUM_SAMPLES):
        offset = random.randrange(-(-size // BLOCK)) * BLOCK
        nbytes = min(BLOCK, size - offset)
        samples.append(Sample(file, offset, nbytes, _digest(reader, file, offset, nbytes)))
    return tuple(samples)


def same_files_as_offered(checkpoint: Checkpoint, offer: Offer) -> tuple[OutgoingFile, ...]:
    """This reader's own outgoing files; RendezvousError unless they are the sender's."""
    files = outgoing_files(checkpoint, include=offer.include, exclude=offer.exclude)
    for mine, theirs in zip(files, offer.files, strict=False):
        if _identity(mine.spec) != _identity(theirs):
            raise RendezvousError(f"this reader's {mine.spec.name} is not the sender's")
    if len(files) != len(offer.files):
        raise RendezvousError(
            f"this reader has {len(files)} files to send, the sender {len(offer.files)}"
        )
    reader = FileReader(files, checkpoint.files)
    for sample in offer.samples:
        if _digest(reader, sample.file, sample.offset, sample.nbytes) != sample.digest:
            raise RendezvousError(
                f"this reader's {offer.files[sample.file].name} differs from the sender's"
                f" at byte {sample.offset} or soon after"
            )
    return files


def check_device(offer: Offer) -> None:
    """Raise RendezvousError if this rank cannot use the device that it is assigned."""
    if offer.backend != "nccl":
        return
    index = int(offer.device.removeprefix("cuda:"))
    if not torch.distributed.is_nccl_available() or index >= torch.cuda.device_count():
        raise RendezvousError(
            f"the sender offers nccl on {offer.device}, which this rank's torch does not support",
            hint="--backend gloo, on the sender, needs no GPU",
        )


def _digest(reader: FileReader, file: int, offset: int, nbytes: int) -> str:
    block = bytearray(nbytes)
    reader.read(file, offset, memoryview(block))
    return xxhash.xxh3_128_hexdigest(block)


def _identity(spec: FileSpec) -> tuple[str, int, bytes | None]:
    return spec.name, spec.nbytes, spec.header.json_bytes if spec.header else None
