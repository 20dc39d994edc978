"""Fixtures of the api tier: a real control plane with simulated GPU nodes (about 6 s to start; see tests/cluster)."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cluster import Cluster
from cluster.fixtures import namespace as new_namespace
from cluster.fixtures import session_cluster

from . import operators


@pytest.fixture(scope="session")
def api_cluster() -> Iterator[Cluster]:
    """Ten simulated nodes of eight GPUs; one cluster for the whole session."""
    with session_cluster("api-tests", "api", kwok_nodes=10) as cluster:
        yield cluster


@pytest.fixture
def namespace(api_cluster: Cluster) -> Iterator[str]:
    """A namespace of this test alone, under the restricted pod security profile."""
    with new_namespace(api_cluster, f"test-{secrets.token_hex(4)}") as name:
        yield name


@pytest.fixture(scope="session")
def installed_cluster(api_cluster: Cluster) -> Cluster:
    """The same with the CRD and the operator's rights, as the chart makes them."""
    operators.install(api_cluster)
    return api_cluster


@pytest.fixture(scope="module")
def operator(installed_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[operators.Operator]:
    """An operator that leads, for the tests of one module."""
    replica = operators.Operator(installed_cluster, tmp_path_factory.mktemp("operator") / "log").start()
    try:
        yield replica
    finally:
        replica.stop()


@pytest.fixture
def log_folder(tmp_path: Path) -> Path:
    """Where replicas that a test starts itself write their logs."""
    return tmp_path
