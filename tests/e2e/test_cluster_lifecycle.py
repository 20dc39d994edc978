"""A cluster beside another, and what is left of it afterwards: nothing."""

import os
from pathlib import Path

import pytest

from cluster import images
from cluster.cluster import Cluster
from cluster.commands import run


def traces(name: str) -> list[str]:
    """Everything on this machine that carries the name of a cluster."""
    processes = (folder / "cmdline" for folder in Path("/proc").glob("[0-9]*"))
    found = [f"process {line!r}" for line in map(_read, processes) if f"/{name}/" in line or f"{name}.sock" in line]
    found += [f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines() if name in line]
    found += [f"namespace {path}" for path in Path("/run/netns").glob("*") if name in path.name]
    found += [f"control group {path}" for path in Path("/sys/fs/cgroup").glob(f"**/*{name}*")]
    found += [f"link {path}" for path in Path("/var/log/containers").glob("*") if name in str(path.readlink())]
    found += [str(path) for path in (Path("/run/finetune-operator", name),) if path.exists()]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.timeout(300)
def test_a_second_cluster_lives_beside_the_first_and_leaves_nothing(cluster: Cluster) -> None:
    name = f"beside-{os.getpid()}"
    other = Cluster.up(name, profile="full", kwok_nodes=2)
    try:
        started = {process.name: process.pid for process in other.processes}
        assert Cluster.up(name, profile="full").kubectl("get", "nodes", "-o", "name").split() == [
            "node/kwok-0",
            "node/kwok-1",
            "node/node-0",
        ]
        assert {process.name: process.pid for process in other.processes} == started, "up twice starts nothing again"
        other.pull(other.registry.publish(images.OPERATOR))
        assert cluster.kubectl("get", "nodes", "-o", "name") == "node/node-0\n"
        assert traces(name) != []
    finally:
        other.down()
    assert traces(name) == []
    settings = other.settings
    routes = run("ip", "-4", "route")
    assert not [
        each for each in (settings.host_address, settings.pod_network, settings.service_network) if each in routes
    ]
    assert Cluster.attach(name) is None
