"""The chart's life in a cluster, by the real helm: install, upgrade, uninstall, and what must survive each."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cluster import Cluster
from cluster.fixtures import namespace as new_namespace

from ..charts import IMAGES, Helm, HelmError
from ..jobs import FineTuneJob, Json, eventually, listed
from ..operators import CHART, Operator

OFF = ("--set", "policy.enabled=false,rbac.userRoles=false")
"""Cluster-wide, and other tests of this cluster have their own."""
ADOPT = ("--take-ownership", "--force-conflicts")
"""The test cluster's CRD was applied by kubectl; the second flag is for that only."""


@pytest.fixture
def helm(installed_cluster: Cluster, tmp_path: Path) -> Helm:
    return Helm(tmp_path, installed_cluster)


@pytest.fixture
def system(installed_cluster: Cluster) -> Iterator[str]:
    """A namespace to install into."""
    name = f"system-{secrets.token_hex(3)}"
    with new_namespace(installed_cluster, name):
        yield name


def crd(cluster: Cluster) -> Json:
    return dict(json.loads(cluster.kubectl("get", "crd", "finetunejobs.finetune.dev", "-o", "json")))


def test_install_runs_two_replicas_in_a_restricted_namespace(
    installed_cluster: Cluster, helm: Helm, system: str
) -> None:
    helm("install", "finetune", CHART, "-n", system, *IMAGES, *OFF, *ADOPT, "--wait", "--timeout=60s")
    cluster = installed_cluster
    assert crd(cluster)["metadata"]["annotations"]["meta.helm.sh/release-namespace"] == system
    pods = listed(cluster, "pods", system)
    assert len(pods) == 2
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2, "on different nodes where possible"
    found = eventually(lambda: _endpoints(cluster, system), "the Service reaches both replicas")
    assert found["ports"][0]["port"] == 8443
    helm("uninstall", "finetune", "-n", system, "--wait")


def _endpoints(cluster: Cluster, system: str) -> Json | None:
    """Where the progress Service leads, once that is to both. The Deployment is available before its endpoints are all there."""
    selector = "kubernetes.io/service-name=finetune-progress"
    found = listed(cluster, "endpointslices", system, selector)
    return found[0] if [len(each["endpoints"] or ()) for each in found] == [2] else None


def test_uninstall_leaves_the_crd_and_every_job_and_another_release_takes_over(
    installed_cluster: Cluster, helm: Helm, system: str, namespace: str
) -> None:
    cluster = installed_cluster
    helm("install", "first", CHART, "-n", system, *IMAGES, *OFF, *ADOPT)
    job = FineTuneJob("survivor", namespace).apply(cluster)
    before = job.read(cluster)
    out = helm("uninstall", "first", "-n", system, "--wait")
    assert "[CustomResourceDefinition] finetunejobs.finetune.dev" in out, "kept, and helm says so"
    assert job.read(cluster)["metadata"]["uid"] == before["metadata"]["uid"]
    left = [each["metadata"]["name"] for each in listed(cluster, "deployments,roles,rolebindings,services", system)]
    assert left == []
    with pytest.raises(HelmError, match="cannot be imported into the current release"):
        helm("install", "second", CHART, "-n", system, *IMAGES, *OFF)
    helm("install", "second", CHART, "-n", system, *IMAGES, *OFF, "--take-ownership")
    assert crd(cluster)["metadata"]["annotations"]["meta.helm.sh/release-name"] == "second"
    assert job.read(cluster)["metadata"]["uid"] == before["metadata"]["uid"]
    helm("uninstall", "second", "-n", system)


def test_upgrade_brings_a_newer_crd(installed_cluster: Cluster, helm: Helm, system: str, tmp_path: Path) -> None:
    """What Helm's own crds/ folder never does."""
    cluster = installed_cluster
    helm("package", CHART, "--destination", tmp_path)
    (archive,) = tmp_path.glob("finetune-operator-*.tgz")
    helm("install", "moving", archive, "-n", system, *IMAGES, *OFF, *ADOPT)
    newer = tmp_path / "newer"
    _copy_with(CHART, newer, "shortNames:\n    - ftj\n", "shortNames:\n    - ftj\n    - tune\n")
    helm("upgrade", "moving", newer, "-n", system, *IMAGES, *OFF, "--force-conflicts")
    assert crd(cluster)["spec"]["names"]["shortNames"] == ["ftj", "tune"]
    helm("upgrade", "moving", CHART, "-n", system, *IMAGES, *OFF, "--force-conflicts")
    assert crd(cluster)["spec"]["names"]["shortNames"] == ["ftj"]
    helm("uninstall", "moving", "-n", system)


def test_upgrade_touches_no_running_job(
    installed_cluster: Cluster, helm: Helm, system: str, namespace: str, log_folder: Path
) -> None:
    """New operator, new trainer image, new CRD: what trains goes on as it was started."""
    cluster = installed_cluster
    helm("install", "finetune", CHART, "-n", system, *IMAGES, *OFF, *ADOPT)
    kinds, selector = "jobs,pods,services,configmaps", "finetune.dev/job=running"
    old = Operator(cluster, log_folder / "old", trainer_image="trainer.test/trainer:1").start()
    try:
        job = FineTuneJob("running", namespace).holds().apply(cluster)
        job.wait(cluster, "Running")
        eventually(lambda: listed(cluster, "jobs", namespace, selector)[0]["status"].get("ready") == 1, "the Job knows")
        before = listed(cluster, kinds, namespace, selector)
        status = job.status(cluster)
    finally:
        old.stop()
    helm(
        "upgrade",
        "finetune",
        CHART,
        "-n",
        system,
        *OFF,
        "--reuse-values",
        "--set",
        "trainer.image=trainer.test/trainer:2",
    )
    new = Operator(cluster, log_folder / "new", trainer_image="trainer.test/trainer:2", relist_seconds=1).start()
    try:
        later = FineTuneJob("later", namespace).holds().apply(cluster)
        later.wait(cluster, "Running")
        assert [_identity(each) for each in listed(cluster, kinds, namespace, selector)] == [*map(_identity, before)]
        assert job.status(cluster) == status
        (pod,) = listed(cluster, "pods", namespace, labels="finetune.dev/job=later")
        assert pod["spec"]["containers"][0]["image"] == "trainer.test/trainer:2"
    finally:
        new.stop()
        helm("uninstall", "finetune", "-n", system)


def _identity(child: Json) -> tuple[str, str, str]:
    return child["kind"], child["metadata"]["uid"], child["metadata"]["resourceVersion"]


def _copy_with(chart: Path, target: Path, old: str, new: str) -> None:
    """A copy of the chart whose CRD has one text replaced."""
    for file in chart.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(chart)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text()
            if file.name == "crds.yaml":
                assert old in text
                text = text.replace(old, new)
            copy.write_text(text)
