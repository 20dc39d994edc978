"""The operator's rights against the audit log: nothing that it does is refused, and what it never did is listed with a reason."""

from pathlib import Path

import pytest
import yaml

from cluster.cluster import Cluster

from ..charts import IMAGES, Helm, one
from ..jobs import FineTuneJob, Json, eventually, listed
from ..operators import NAMESPACE, USER, Operator
from ..reporting import ours, reporter

Right = tuple[str, str, str]
"""API group, resource (with subresource), verb."""

CAN_DO_WITHOUT: dict[Right, str] = {
    ("finetune.dev", "finetunejobs/finalizers", "update"): (
        "never called: the API server asks for it before it lets a child block its owner's deletion"
    ),
    ("finetune.dev", "finetunejobs", "get"): "only when a watch lags behind, or a finished job's body is needed again",
    ("batch", "jobs", "get"): "only when a watch lags behind",
    ("", "pods", "get"): "only when a report comes before the watch has seen its pod",
    ("", "secrets", "update"): "once in 30 days, for a new certificate",
}
"""What a run of every kind of job may leave unused. An entry without need is a right to take away."""


@pytest.fixture(scope="module")
def granted(tmp_path_factory: pytest.TempPathFactory) -> set[Right]:
    documents = Helm(tmp_path_factory.mktemp("helm")).template(*IMAGES, namespace=NAMESPACE)
    roles = (
        one(documents, "ClusterRole", f"finetune-operator.{NAMESPACE}"),
        one(documents, "Role", "finetune-operator"),
    )
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_rights_are_neither_too_few_nor_too_many(
    installed_cluster: Cluster, namespace: str, log_folder: Path, granted: set[Right]
) -> None:
    cluster = installed_cluster
    for kind, name in (("lease", "finetune-operator"), ("secret", "finetune-operator-progress")):
        cluster.kubectl("delete", kind, name, "-n", NAMESPACE, "--ignore-not-found")
    mark = cluster.audit.mark()
    operator = Operator(cluster, log_folder / "log", progress_host="127.0.0.1").start()
    try:
        _live_through_everything(cluster, namespace)
    finally:
        operator.stop()
    # A namespace of an earlier test that is on its way refuses whatever is made in it.
    events = [e for e in cluster.audit.since(mark, user=USER) if e.namespace in ("", namespace, NAMESPACE)]
    assert [f"{e.verb} {e.resource}/{e.subresource} {e.name}" for e in events if e.code == 403] == []
    used = {(e.group, f"{e.resource}/{e.subresource}".rstrip("/"), e.verb) for e in events if e.resource}
    assert used <= granted
    assert granted - used <= CAN_DO_WITHOUT.keys()
    assert CAN_DO_WITHOUT.keys() <= granted


def test_namespaced_operator_needs_rights_in_its_namespaces_only(
    installed_cluster: Cluster, namespace: str, log_folder: Path, tmp_path: Path
) -> None:
    cluster = installed_cluster
    user, elsewhere = f"system:serviceaccount:{namespace}:finetune-operator", f"{namespace}-b"
    values = ("--set", f"watchNamespaces={{{namespace}}},crds.install=false,rbac.userRoles=false,policy.enabled=false")
    documents = Helm(tmp_path).template(*IMAGES, *values, namespace=namespace)
    rights = yaml.safe_dump_all([each for each in documents if "Role" in each["kind"]])
    cluster.kubectl("apply", "-f", "-", stdin=rights)
    cluster.api.create("namespaces", {"metadata": {"name": elsewhere}})
    mark = cluster.audit.mark()
    operator = Operator(
        cluster,
        log_folder / "log",
        namespace=namespace,
        watch_namespaces=namespace,
        kubeconfig=cluster.kubeconfig_for(user, "system:serviceaccounts", "system:authenticated"),
        progress_host="127.0.0.1",
    ).start()
    try:
        outside = FineTuneJob("outside", elsewhere).finishes().apply(cluster)
        inside = FineTuneJob("inside", namespace).holds().apply(cluster)
        assert reporter(cluster, inside).post(ours(1)).code == 200
        inside.until(cluster, lambda status: status.get("progress"))
        assert outside.status(cluster) == {}
    finally:
        operator.stop()
        cluster.kubectl("delete", "-f", "-", "--wait=false", stdin=rights)
        cluster.api.delete("namespaces", elsewhere)
    events = cluster.audit.since(mark, user=user)
    assert events
    assert [f"{e.verb} {e.resource}/{e.subresource} {e.name}" for e in events if e.code == 403] == []


def _live_through_everything(cluster: Cluster, namespace: str) -> None:
    """A job of each kind that asks for another right."""
    plain = FineTuneJob("plain", namespace).finishes("1s").having(resources={"nodes": 2}, cleanup={"afterSeconds": 0})
    no_class = FineTuneJob("no-class", namespace).having(priorityClassName="not-there")
    shared = FineTuneJob("shared", namespace).having(resources={"nodes": 2}, output={"uri": "pvc://not-there/out"})
    paused = FineTuneJob("paused", namespace).holds()
    drained = FineTuneJob("drained", namespace).holds().kwok(stop_for="5s")
    for job in (plain, no_class, shared, paused, drained):
        job.apply(cluster)
    assert reporter(cluster, paused).post(ours(1)).code == 200
    paused.edit(cluster, suspend=True)
    paused.wait(cluster, "Suspended")
    pod = reporter(cluster, drained).pod
    cluster.api.delete("pods", pod, namespace)
    no_class.wait(cluster, "Waiting")
    shared.until(cluster, lambda status: status.get("conditions"))
    plain.wait(cluster, "Complete")
    kinds = "jobs,configmaps,services"
    eventually(lambda: not _children(cluster, kinds, namespace, "plain"), "what cleanup removes")
    drained.until(cluster, lambda status: status["attempts"][-1].get("runs") == 2)


def _children(cluster: Cluster, kinds: str, namespace: str, name: str) -> list[Json]:
    return listed(cluster, kinds, namespace, labels=f"finetune.dev/job={name}")
