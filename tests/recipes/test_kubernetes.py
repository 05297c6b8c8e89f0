"""The recipe for Kubernetes: its command lines, with the variables that the operator adds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from packcast.launch.launchers import Launch, detect_launch, rendezvous_address
from packcast.launch.secret import launch_context, launch_secret
from tests.helpers.checkpoints import same_tree, sharded
from tests.helpers.commands import Commands, free_port, wait_all

TEXT = Path(__file__).with_name("kubernetes.yaml").read_text()
NAME = re.findall(r"^  name: (\S+)$", TEXT, re.MULTILINE)[0]
COMMANDS = [json.loads(found) for found in re.findall(r"^ +command: (\[.*\])$", TEXT, re.MULTILINE)]
MASTERS, WORKERS = map(int, re.findall(r"^ +replicas: (\d+)$", TEXT, re.MULTILINE))
PORT = re.findall(r"name: pytorchjob-port.*\n +containerPort: (\d+)", TEXT)[0]


def pod_environment(rank: int) -> dict[str, str]:
    """What the operator sets in a pod, of a job with a master and without an elastic policy."""
    world_size = str(MASTERS + WORKERS)
    address = f"{NAME}-master-0"
    return {
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": PORT,
        "WORLD_SIZE": world_size,
        "RANK": str(rank),
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": PORT,
        "PET_NPROC_PER_NODE": "auto",
        "PET_NNODES": world_size,
        "PET_NODE_RANK": str(rank),
    }


def test_the_operators_variables_make_a_launch_of_one_rank_for_each_pod() -> None:
    for rank in range(MASTERS + WORKERS):
        environ = pod_environment(rank)
        launch = detect_launch(environ)
        assert launch == Launch("torchrun", rank, 4, local_rank=0, local_world_size=1)
        assert rendezvous_address(launch, environ, None) == ("copy-model-master-0", 23456)
        context = launch_context(launch, environ, 0)
        assert launch_secret(launch, environ, b"of the secret", context) == b"of the secret"


def test_every_pod_has_the_token_of_one_secret() -> None:
    references = re.findall(
        r"name: PACKCAST_TOKEN\n +valueFrom:\n +secretKeyRef:\n +name: (\S+)\n +key: (\S+)", TEXT
    )
    assert references == [("packcast", "token")] * 2
    assert "kubectl create secret generic packcast --from-literal=token=" in TEXT


def test_the_network_policy_passes_the_ports_of_the_command_line() -> None:
    first, last = COMMANDS[0][COMMANDS[0].index("--port-range") + 1].split("-")
    assert int(first) == int(PORT) + 1
    assert f"port: {PORT}\n          endPort: {last}\n" in TEXT


def test_what_the_pods_run_copies_to_every_worker(commands: Commands, tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "shared" / "model", 2, 100_000)
    port = str(free_port())
    here = {"/shared/model": checkpoint, "23457-23466": "20000-29999"}

    def pod(rank: int) -> list[str | Path]:
        program, *argv = COMMANDS[min(rank, 1)]
        assert program == "packcast"
        local = tmp_path / f"node-{rank}"
        local.mkdir()
        return [here.get(word, word.replace("/local/", f"{local}/")) for word in argv]

    ranks = [
        commands.packcast(
            *pod(rank),
            environment=pod_environment(rank)
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PACKCAST_TOKEN": "of the secret"},
        )
        for rank in reversed(range(MASTERS + WORKERS))
    ]
    for ended in wait_all(ranks):
        assert ended.returncode == 0, ended.stderr
    for rank in range(1, 1 + WORKERS):
        same_tree(checkpoint, tmp_path / f"node-{rank}" / "model")


def test_it_is_yaml_of_the_two_kinds() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    job, policy = yaml.safe_load_all(TEXT)
    assert (job["kind"], policy["kind"]) == ("PyTorchJob", "NetworkPolicy")
    specs = job["spec"]["pytorchReplicaSpecs"]
    containers = [specs[kind]["template"]["spec"]["containers"][0] for kind in ("Master", "Worker")]
    assert [each["name"] for each in containers] == ["pytorch", "pytorch"]
    assert [each["command"] for each in containers] == COMMANDS
    for kind in ("Master", "Worker"):
        spec = specs[kind]["template"]["spec"]
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}
