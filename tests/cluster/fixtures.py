"""What the pytest fixtures of tests/api and tests/e2e share: clusters for a test session, and namespaces in them.

A cluster is one worker's own, or shared by all workers of a session; then the first that asks starts it, and the process that
they are children of takes it down.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cluster import Cluster
from .console import say
from .paths import cache_root
from .settings import Profile

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


@contextmanager
def session_cluster(name: str, profile: Profile, kwok_nodes: int = 0) -> Iterator[Cluster]:
    """A cluster of this worker alone; with FINETUNE_KEEP_CLUSTER=1 one that stays and is found by the next run."""
    cluster = Cluster.up(_name(name, os.getpid()), profile, kwok_nodes)
    try:
        yield cluster
    finally:
        _end(cluster)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One process at a time, of all test sessions on this machine."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shared_cluster(name: str, profile: Profile, kwok_nodes: int = 0) -> Cluster:
    """The cluster of all workers of this session; call it inside `alone`."""
    return Cluster.up(_name(name, _session()), profile, kwok_nodes)


def end_shared(name: str) -> None:
    """Takes down what `shared_cluster` has started; called at the end of a session, in the process that its workers are children of."""
    if "PYTEST_XDIST_WORKER" not in os.environ and (cluster := Cluster.attach(_name(name, _session()))):
        _end(cluster)


def _session() -> int:
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


def _keeps() -> bool:
    return os.environ.get("FINETUNE_KEEP_CLUSTER") == "1"


def _name(name: str, pid: int) -> str:
    with alone("sweep"):
        _sweep(name)
    return name if _keeps() else f"{name}-{pid}"


def _end(cluster: Cluster) -> None:
    if _keeps():
        cluster.end_guests()
        name = cluster.settings.name
        say(f"cluster {name} stays up (python -m cluster down --name {name})")
    else:
        cluster.down()


@contextmanager
def namespace(cluster: Cluster, name: str) -> Iterator[str]:
    """A namespace that enforces the restricted pod security profile, deleted in the background after the block."""
    cluster.api.create("namespaces", {"metadata": {"name": name, "labels": RESTRICTED}})
    try:
        yield name
    finally:
        cluster.api.delete("namespaces", name)


def _sweep(name: str) -> None:
    """Takes down what test sessions left behind that were killed: clusters named by the pid of a process that is gone."""
    for folder in (cache_root() / "run").glob(f"{name}-*"):
        session = re.fullmatch(rf"{re.escape(name)}-(\d+)", folder.name)
        leftover = Cluster.attach(folder.name)
        if session and leftover and not Path("/proc", session.group(1)).exists():
            say(f"taking down {folder.name}, left behind by a test session that was killed")
            leftover.down()
