"""Copy a checkpoint to a disk of every node of a Ray cluster, read once.

    python ray_copy.py /shared/model /local/model --port 29400

Run it on a node of the cluster that sees the checkpoint, with packcast installed on all nodes.
That node sends; on every other one an actor receives and writes its copy.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from packcast import receive_checkpoint, send_checkpoint


# The copy takes no CPUs from Ray's books, and no GPU: it goes over gloo. With num_gpus=1 here and
# on the sender it would go over NCCL.
@ray.remote(num_cpus=0)
class Receiver:
    """One node's end of the transfer."""

    def receive(self, address: tuple[str, int], token: str, out: str) -> str:
        """Blocks until the copy is in place and proven."""
        report = receive_checkpoint(address, token=token, out=out, force=True)
        return f"{ray.util.get_node_ip_address()}: {report.nbytes / 1e9:.2f} GB"


def copy_to_all_nodes(checkpoint: str, out: str, port: int) -> list[str]:
    """Send `checkpoint` from this node to `out` on every other one; what they say of it.

    `out` may have {rank} and {host} in it.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not others:
        return []
    address = (ray.util.get_node_ip_address(), port)
    token = secrets.token_hex(16)
    receivers = [
        Receiver.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        for node in others
    ]
    said = [actor.remote().receive.remote(address, token, out) for actor in receivers]
    send_checkpoint(checkpoint, workers=len(others), listen=address, token=token)
    return ray.get(said)


def main(arguments: Sequence[str] | None = None) -> None:
    """Connect to the cluster of this node, and copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--port", type=int, default=29400, help="where this node listens")
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    given = parser.parse_args(arguments)
    ray.init(given.address, log_to_driver=True)
    for line in copy_to_all_nodes(given.checkpoint, given.out, given.port):
        print(line)


if __name__ == "__main__":
    main()
