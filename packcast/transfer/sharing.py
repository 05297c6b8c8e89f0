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


def hand_out_shares(server: ControlServer, infos: Sequence[RankInfo], timeout_s: float) -> None:
    """Once every worker has prepared its sink: tell each what of its copy it writes. The sender."""
    prepared = server.gather(Prepared, timeout_s)
    for rank, share in shares_of(infos, prepared).items():
        server.send(rank, WritingShare(index=share.index, count=share.count))


def take_share(sink: Sink, client: ControlClient, timeout_s: float) -> None:
    """Say which directory this rank could write into, and write the share of it that it is given.

    Every worker, after `prepare`.
    """
    directory = sink.partial_identity if isinstance(sink, WriteSink) else None
    owns = isinstance(sink, WriteSink) and sink.wrote
    client.send(Prepared(directory=directory, owns=owns))
    share = client.expect(WritingShare, timeout_s)
    if isinstance(sink, WriteSink):
        sink.take_share(Share(share.index, share.count))


def shares_of(infos: Sequence[RankInfo], prepared: Mapping[int, Prepared]) -> dict[int, Share]:
    """Each worker's share: of what its owner and the other ranks of the same host have open.

    The owner's is the first. Who has no such directory, or sees it from another host, is alone.
    """
    hosts = {info.known_rank: info.boot_id for info in infos}
    sharing: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for rank, it in sorted(prepared.items(), key=lambda item: (not item[1].owns, item[0])):
        if it.directory is not None:
            sharing.setdefault((hosts[rank], it.directory), []).append(rank)
    shares = dict.fromkeys(prepared, Share(0, 1))
    for ranks in sharing.values():
        if prepared[ranks[0]].owns:
            shares.update({rank: Share(i, len(ranks)) for i, rank in enumerate(ranks)})
    return shares
