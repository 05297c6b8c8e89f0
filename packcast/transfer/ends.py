"""The two ends of the bytes on a worker: its sink, and the files that it reads as a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from packcast.control.client import ControlClient
from packcast.control.rank_info import RankInfo
from packcast.errors import PackcastError, TransferError
from packcast.io.landing import Sink
from packcast.io.sinks.discard import DiscardSink
from packcast.io.sinks.localcopy import local_copy
from packcast.io.sinks.tensor_destination import TensorDestination
from packcast.io.sinks.tensors import TensorSink
from packcast.io.sinks.verify import VerifySink
from packcast.io.sinks.write import WriteSink
from packcast.io.source import FileReader
from packcast.settings import fill_in
from packcast.transfer.agreement import same_files_as_offered
from packcast.transfer.offer import Offer
from packcast.transfer.session import Session

# Takes a device and how many bytes of finished tensors may wait; for receiving tensors.
MakeDestination = Callable[[str, int], TensorDestination]


def make_sink(
    session: Session, offer: Offer, me: RankInfo, make_destination: MakeDestination | None
) -> Sink:
    """The sink that the settings ask for; of tensors with `make_destination`."""
    settings = session.settings
    if make_destination is not None:
        return TensorSink(offer.files, make_destination(offer.device, offer.staging))
    if settings.target is None:
        return DiscardSink()
    local_rank = session.launch.local_rank
    target = Path(fill_in(settings.target, rank=offer.rank, local_rank=local_rank, host=me.host))
    if settings.sink == "verify":
        is_selection = bool(offer.include or offer.exclude)
        return VerifySink(local_copy(target, offer.files), offer.files, selection=is_selection)
    return WriteSink(
        target,
        offer.files,
        transfer_id=session.channel.transfer_id,
        force=settings.force,
        in_place=settings.in_place,
    )


def own_reader(session: Session, offer: Offer) -> FileReader | None:
    """For a worker that the sender chose as a reader."""
    if offer.rank not in offer.readers:
        return None
    if session.checkpoint is None:
        raise TransferError("the sender chose this rank as a reader, but it has no checkpoint")
    return FileReader(same_files_as_offered(session.checkpoint, offer), session.checkpoint.files)


@contextmanager
def undone_on_error(sink: Sink, client: ControlClient) -> Iterator[None]:
    """After any error: notify the others first, then remove what the sink has made."""
    try:
        yield
    except BaseException as error:
        client.fail(error if isinstance(error, PackcastError) else PackcastError(repr(error)))
        sink.abort()
        raise
