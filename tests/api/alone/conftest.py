"""Tests that stop the operator or the API server, or change what is the whole cluster's: each worker that runs some has a cluster of its own."""

from collections.abc import Iterator

import pytest

from cluster.cluster import Cluster
from cluster.fixtures import session_cluster

from .. import operators


@pytest.fixture(scope="session")
def api_cluster() -> Iterator[Cluster]:
    """Ten simulated nodes of eight GPUs."""
    with session_cluster("api-alone", "api", kwok_nodes=10) as cluster:
        yield cluster


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
