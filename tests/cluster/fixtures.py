"""What the pytest fixtures of tests/api and tests/e2e share: a cluster for a test session, and namespaces in it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cluster import Cluster
from .console import say
from .paths import cache_root
from .settings import Profile

RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


@contextmanager
def session_cluster(name: str, profile: Profile, kwok_nodes: int = 0) -> Iterator[Cluster]:
    """A cluster of this test session alone; with FINETUNE_KEEP_CLUSTER=1 one that stays and is found by the next run."""
    _sweep(name)
    keep = os.environ.get("FINETUNE_KEEP_CLUSTER") == "1"
    cluster = Cluster.up(name if keep else f"{name}-{os.getpid()}", profile, kwok_nodes)
    try:
        yield cluster
    finally:
        if keep:
            say(f"cluster {name} stays up (python -m cluster down --name {name})")
        else:
            cluster.down()


@contextmanager
def namespace(cluster: Cluster, name: str) -> Iterator[str]:
    """A namespace that enforces the restricted pod security profile, deleted in the background after the block."""
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, RESTRICTED)
    try:
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")


def _sweep(name: str) -> None:
    """Takes down what test sessions left behind that were killed: clusters named by the pid of a process that is gone."""
    for folder in (cache_root() / "run").glob(f"{name}-*"):
        session = re.fullmatch(rf"{re.escape(name)}-(\d+)", folder.name)
        leftover = Cluster.attach(folder.name)
        if session and leftover and not Path("/proc", session.group(1)).exists():
            say(f"taking down {folder.name}, left behind by a test session that was killed")
            leftover.down()
