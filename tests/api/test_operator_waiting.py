"""Waiting is not failing: what is missing is a condition in the words of whoever misses it, and goes when it is there."""

from typing import Any

import pytest

from cluster.cluster import Cluster
from finetune_operator.identities import child_name, labels

from .jobs import FineTuneJob, condition, eventually, listed, pool

pytestmark = pytest.mark.usefixtures("operator")


def _claim(name: str, mode: str) -> dict[str, Any]:
    spec = {"accessModes": [mode], "storageClassName": "none", "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def test_a_pool_that_is_scaled_to_zero(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("no-pool", namespace).finishes().having(resources=pool(namespace))
    status = job.apply(cluster).wait(cluster, "Waiting")
    waiting = condition(status, "Waiting")
    assert (status["phase"], waiting["reason"]) == ("Waiting", "WaitingForNodes")
    assert "node affinity/selector" in waiting["message"]
    assert condition(status, "Reconciling") == {}, "it would keep Flux from applying anything else"

    def told() -> list[str]:
        events = listed(cluster, "events.events.k8s.io", namespace)
        return [each["note"] for each in events if each["reason"] == "WaitingForNodes"]

    eventually(told, "an event")
    assert len(told()) == 1 and "node affinity/selector" in told()[0]
    cluster.kwok.add_nodes([f"pool-{namespace}"], labels={"pool": namespace}, taint=namespace)
    try:
        assert condition(job.wait(cluster, "Complete"), "Waiting") == {}
    finally:
        cluster.api.delete("nodes", f"pool-{namespace}")


def test_a_claim_that_is_not_there(installed_cluster: Cluster, namespace: str) -> None:
    job = FineTuneJob("no-claim", namespace).finishes().having(output={"uri": "pvc://nowhere/out"})
    status = job.apply(installed_cluster).wait(installed_cluster, "Waiting")
    assert condition(status, "Waiting")["reason"] == "WaitingForObject"
    assert "nowhere" in condition(status, "Waiting")["message"]


def test_a_job_that_is_continued(installed_cluster: Cluster, namespace: str) -> None:
    """A chain that is applied at once: the second waits for the first, and trains from what that published."""
    cluster = installed_cluster
    adapter = {"job": "first", "secretRef": {"name": "reader"}}
    second = FineTuneJob("second", namespace).holds().having(model={"uri": "hf://example/model", "adapter": adapter})
    waiting = condition(second.apply(cluster).wait(cluster, "Waiting"), "Waiting")
    assert (waiting["reason"], waiting["message"][:17]) == ("WaitingForJob", "model.adapter.job")
    FineTuneJob("first", namespace).finishes().apply(cluster).wait(cluster, "Complete")
    status = second.until(cluster, lambda status: status.get("attempts"))
    assert condition(status, "Waiting").get("reason") != "WaitingForJob"
    pinned = status["resolved"]["model"]["adapter"]
    assert (pinned["uri"], pinned["digest"]) == ("pvc://models/out", "sha256:0123")


def test_a_reward_model_that_another_job_makes(installed_cluster: Cluster, namespace: str) -> None:
    """What that publishes here is an adapter: it judges on the base that it was trained on."""
    cluster = installed_cluster
    rewards = [{"name": "liked", "model": {"job": "judge"}}]
    better = FineTuneJob("better", namespace).holds().having(objective={"grpo": {"rewards": rewards}})
    waiting = condition(better.apply(cluster).wait(cluster, "Waiting"), "Waiting")
    field = "objective.grpo.rewards[0].model.job"
    assert (waiting["reason"], waiting["message"].split(": ")[0]) == ("WaitingForJob", field)
    judge = FineTuneJob("judge", namespace).finishes().having(objective={"reward": {}})
    judge.apply(cluster).wait(cluster, "Complete")
    status = better.until(cluster, lambda status: status.get("attempts"))
    assert condition(status, "Waiting").get("reason") != "WaitingForJob"
    (pinned,) = status["resolved"]["objective"]["grpo"]["rewards"]
    assert pinned["model"]["uri"] == "hf://example/model"
    adapter = pinned["model"]["adapter"]
    assert (adapter["job"], adapter["uri"], adapter["digest"]) == ("judge", "pvc://models/out", "sha256:0123")


def test_a_service_account_that_is_not_there(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("no-account", namespace).finishes()
    job.spec["runtime"]["serviceAccountName"] = "cloud-reader"
    status = job.apply(cluster).wait(cluster, "Waiting")
    assert condition(status, "Waiting")["reason"] == "WaitingForObject"
    assert "cloud-reader" in condition(status, "Waiting")["message"]


def _set_quota(cluster: Cluster, namespace: str, hard: dict[str, str]) -> None:
    """And waits until it counts."""
    cluster.api.create("resourcequotas", {"metadata": {"name": "q"}, "spec": {"hard": hard}}, namespace)
    eventually(
        lambda: cluster.api.get("resourcequotas", "q", namespace).get("status", {}).get("hard"), "a quota in force"
    )


def test_a_quota_on_pods(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    _set_quota(cluster, namespace, {"requests.nvidia.com/gpu": "0"})
    status = FineTuneJob("over-quota", namespace).finishes().apply(cluster).wait(cluster, "Waiting")
    assert condition(status, "Waiting")["reason"] == "WaitingForQuota"
    assert "exceeded quota" in condition(status, "Waiting")["message"]


def test_a_quota_on_jobs_holds_the_children_back(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    _set_quota(cluster, namespace, {"count/jobs.batch": "0"})
    job = FineTuneJob("no-job", namespace).finishes().apply(cluster)
    status = job.wait(cluster, "Waiting")
    assert condition(status, "Waiting")["reason"] == "WaitingForQuota"
    cluster.api.delete("resourcequotas", "q", namespace)
    status = job.wait(cluster, "Complete", seconds=90)
    assert len(status["attempts"]) == 1


def test_a_name_that_somebody_else_has_taken(installed_cluster: Cluster, namespace: str) -> None:
    """Nothing is adopted that the job does not control, whatever its name and labels say."""
    cluster = installed_cluster
    job = FineTuneJob("squatted", namespace).finishes().having(suspend=True).apply(cluster)
    uid = job.read(cluster)["metadata"]["uid"]
    squatter = {"name": child_name(job.name, uid, 1), "labels": labels(job.name, uid, 1)}
    cluster.api.create("configmaps", {"metadata": squatter}, namespace)
    job.having(suspend=False).apply(cluster)
    status = job.wait(cluster, "Waiting")
    assert condition(status, "Waiting")["reason"] == "WaitingForObject"
    assert squatter["name"] in condition(status, "Waiting")["message"]
    assert not listed(cluster, "jobs", namespace)
    cluster.api.delete("configmaps", str(squatter["name"]), namespace)
    job.wait(cluster, "Complete", seconds=90)


def test_children_that_the_api_server_will_never_take_fail_as_the_users_error(
    installed_cluster: Cluster, namespace: str
) -> None:
    wrong = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}
    job = FineTuneJob("wrong", namespace).finishes().having(resources={"affinity": wrong}).apply(installed_cluster)
    status = job.wait(installed_cluster, "Failed")
    assert status["failure"]["cause"] == "UserError"
    assert "nodeSelectorTerms" in status["failure"]["message"]
    job.having(resources={"nodes": 1}).apply(installed_cluster)
    job.wait(installed_cluster, "Complete")


@pytest.mark.parametrize(
    ("mode", "refused"),
    [
        pytest.param("ReadWriteOnce", True, id="one node at a time"),
        pytest.param("ReadOnlyMany", True, id="output on what is read-only"),
        pytest.param("ReadWriteMany", False, id="shared"),
    ],
)
def test_several_nodes_on_one_claim(installed_cluster: Cluster, namespace: str, mode: str, refused: bool) -> None:
    cluster = installed_cluster
    cluster.api.create("persistentvolumeclaims", _claim("disk", mode), namespace)
    job = FineTuneJob("shared", namespace).finishes()
    job.having(resources={"nodes": 2}, output={"uri": "pvc://disk/out"}).apply(cluster)
    if not refused:
        status = job.wait(cluster, "Waiting")
        assert "unbound immediate PersistentVolumeClaims" in condition(status, "Waiting")["message"]  # no volumes here
        return
    status = job.wait(cluster, "Failed")
    assert condition(status, "Failed")["reason"] == "VolumeNotShared"
    assert mode in status["failure"]["message"]
    assert not listed(cluster, "jobs", namespace)
    job.having(resources={"nodes": 1}, output={"uri": "s3://bucket/out"}).apply(cluster)
    job.wait(cluster, "Complete")
