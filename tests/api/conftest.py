"""Fixtures of the api tier: a real control plane with simulated GPU nodes (about 6 s to start; see tests/cluster).

All workers share one cluster and one operator, which lives through the whole session: tests are apart by their namespaces. What stops
one of the two, or changes what is the whole cluster's, is in `alone`.
"""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from cluster import fixtures
from cluster.cluster import Cluster, Refused

from . import operators

NAME = "api-tests"
TOGETHER = {
    "alone/test_faults": "faults",
    "alone/": "alone",
    "test_chart_policy": "policy",  # in force in the whole cluster, while one worker tests it
    "test_progress": "progress",  # a replica counts refusals by address, and all tests have the same
}
"""Parts of files' names, first match first: their tests run in one worker, one after the other."""


class _Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].removeprefix("tests/api/")
        return next((group for part, group in TOGETHER.items() if file.startswith(part)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    return _Scheduling(config, log)


@pytest.fixture(scope="session")
def api_cluster() -> Cluster:
    """Ten simulated nodes of eight GPUs."""
    with fixtures.alone(NAME):
        return fixtures.shared_cluster(NAME, "api", kwok_nodes=10)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    fixtures.end_shared(NAME)


@pytest.fixture
def namespace(api_cluster: Cluster) -> Iterator[str]:
    """A namespace of this test alone, under the restricted pod security profile. What it leaves there is deleted, but not the
    namespace: that costs the control plane as much as a test."""
    name = f"test-{secrets.token_hex(4)}"
    api_cluster.api.create("namespaces", {"metadata": {"name": name, "labels": fixtures.RESTRICTED}})
    yield name
    for kind in ("finetunejobs", "jobs"):
        try:
            api_cluster.api.delete(kind, namespace=name)
        except Refused as error:
            assert error.code == 404  # a cluster without our CRD


@pytest.fixture(scope="session")
def installed_cluster(api_cluster: Cluster) -> Cluster:
    """The same with the CRD and the operator's rights, as the chart makes them."""
    with fixtures.alone(NAME):
        operators.install(api_cluster)
    return api_cluster


@pytest.fixture(autouse=True)
def _operator_runs(request: pytest.FixtureRequest) -> None:
    """One that has ended, as by losing its Lease on a busy machine, fails a test and not all that follow."""
    if "operator" in request.fixturenames:
        with fixtures.alone(NAME):
            operators.shared(request.getfixturevalue("installed_cluster"))


@pytest.fixture(scope="session")
def operator(installed_cluster: Cluster) -> operators.Operator:
    """The operator that leads, with a progress server that pods would reach on loopback."""
    with fixtures.alone(NAME):
        return operators.shared(installed_cluster)


@pytest.fixture
def log_folder(tmp_path: Path) -> Path:
    """Where replicas that a test starts itself write their logs."""
    return tmp_path
