"""Which ranks of one host write one copy together: agreed before anybody makes its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from packcast.control.client import ControlClient
from packcast.control.rank_info import RankInfo
from packcast.control.server import ControlServer
from packcast.io.landing import Sink
from packcast.io.sinks.sharing import Share
from packcast.io.sinks.write import WriteSink
from packcast.transfer.protocol import Prepared, WritingShare


def hand_out_shares(
    server: ControlServer, infos: Sequence[RankInfo], timeout_s: float
) -> dict[int, int]:
    """Once every worker has prepared its sink: tell each what of its copy it writes. The sender.

    Which other rank publishes a worker's copy, by worker, where one does.
    """
    prepared = server.gather(Prepared, timeout_s)
    for rank, share in shares_of(infos, prepared).items():
        server.send(rank, WritingShare(index=share.index, count=share.count))
    return owners_of(prepared)


def take_share(sink: Sink, client: ControlClient, timeout_s: float) -> None:
    """Say which directory this rank could write into, and write the share of it that it is given.

    Every worker, after `prepare`.
    """
    prepared = Prepared(copy_id=None, directory=None, owns=False)
    if isinstance(sink, WriteSink):
        prepared = Prepared(copy_id=sink.copy_id, directory=sink.partial_identity, owns=sink.wrote)
    client.send(prepared)
    share = client.expect(WritingShare, timeout_s)
    if isinstance(sink, WriteSink):
        sink.take_share(Share(share.index, share.count))


def shares_of(infos: Sequence[RankInfo], prepared: Mapping[int, Prepared]) -> dict[int, Share]:
    """Each worker's share: of what its owner and the other ranks of the same host have open.

    The owner's is the first. A worker without such a directory, or one that sees it from another
    host or through another mount, writes alone: if it took another directory for the owner's, the
    copy would have holes.
    """
    hosts = {info.known_rank: info.boot_id for info in infos}
    sharing: dict[tuple[str, str, tuple[int, int]], list[int]] = {}
    for rank, it in sorted(prepared.items(), key=lambda item: (not item[1].owns, item[0])):
        if it.directory is not None and it.copy_id is not None:
            sharing.setdefault((hosts[rank], it.copy_id, it.directory), []).append(rank)
    shares = dict.fromkeys(prepared, Share(0, 1))
    for ranks in sharing.values():
        if [prepared[rank].owns for rank in ranks[:2]] == [True, False]:
            shares.update({rank: Share(i, len(ranks)) for i, rank in enumerate(ranks)})
    return shares


def owners_of(prepared: Mapping[int, Prepared]) -> dict[int, int]:
    """The rank that publishes, for each worker whose directory another rank has made."""
    owners = {it.copy_id: rank for rank, it in prepared.items() if it.owns}
    return {
        rank: owners[it.copy_id]
        for rank, it in prepared.items()
        if it.copy_id is not None and not it.owns and it.copy_id in owners
    }


def state_of_copy(sink: Sink) -> str:
    """For a message: what this rank knows of its copy after the sender was lost."""
    if isinstance(sink, WriteSink) and not sink.wrote:
        return f"so look whether {sink.result()['target']} is there: another rank publishes it"
    return "after this rank had published"
