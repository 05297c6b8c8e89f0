"""The recipe for Ray, on a cluster of three nodes that are all on this host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_tree, sharded
from tests.helpers.commands import Commands, free_port

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

RECIPE = Path(__file__).with_name("ray_copy.py")
# In a process of its own, since the warnings of Ray's modules are not ours.
THREE_NODES = """
import runpy, sys
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for _ in range(2):
    cluster.add_node(num_cpus=1)
try:
    sys.argv = [*sys.argv[1:], "--address", cluster.address]
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_every_other_node_of_a_ray_cluster_gets_a_copy(commands: Commands, tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "model", 2, 100_000)
    argv = [checkpoint, tmp_path / "copy-{rank}", "--port", str(free_port())]
    ended = commands.start([sys.executable, "-c", THREE_NODES, RECIPE, *argv]).wait(100)
    assert ended.returncode == 0, ended.stderr
    for rank in (1, 2):
        same_tree(checkpoint, tmp_path / f"copy-{rank}")
