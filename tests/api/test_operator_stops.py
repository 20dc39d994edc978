"""Suspension, deadline, lost nodes, and edits before and while it trains."""

import json
import time

import pytest

from cluster.cluster import Cluster, Refused

from .jobs import FineTuneJob, condition, eventually, listed, pool

pytestmark = pytest.mark.usefixtures("operator")


def _suspend(cluster: Cluster, job: FineTuneJob, value: bool) -> None:
    job.edit(cluster, suspend=value)


def test_suspend_frees_the_gpus_and_resume_goes_on_in_the_same_job(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("paused", namespace).holds(stop_code=75).kwok(stop_for="2s").apply(cluster)
    job.wait(cluster, "Running")
    _suspend(cluster, job, True)
    status = job.wait(cluster, "Suspended")
    assert status["phase"] == "Suspended"
    assert not listed(cluster, "pods", namespace, fields="status.phase=Running")
    assert status["attempts"][0]["gpuSeconds"] >= 1
    assert status["causeCounts"] == [{"cause": "Suspended", "count": 1}]
    time.sleep(2)  # nothing may start by itself
    assert not listed(cluster, "pods", namespace, fields="status.phase=Running")
    _suspend(cluster, job, False)
    status = job.until(cluster, lambda s: s["phase"] == "Running" and s["attempts"][-1]["runs"] == 2)
    assert condition(status, "Suspended") == {}
    assert len(status["attempts"]) == len(listed(cluster, "jobs", namespace)) == 1


@pytest.mark.parametrize("stop_code", [137, 143])
def test_a_trainer_that_is_killed_while_suspending_is_suspended_all_the_same(
    installed_cluster: Cluster, namespace: str, stop_code: int
) -> None:
    cluster = installed_cluster
    job = FineTuneJob("killed", namespace).holds(stop_code=stop_code).having(retries=0).apply(cluster)
    job.wait(cluster, "Running")
    _suspend(cluster, job, True)
    status = job.wait(cluster, "Suspended")
    assert condition(status, "Failed") == {}
    _suspend(cluster, job, False)
    job.wait(cluster, "Running")


def test_a_job_that_is_applied_suspended_makes_nothing(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("later", namespace).finishes().having(suspend=True).apply(cluster)
    job.wait(cluster, "Suspended")
    assert not listed(cluster, "jobs", namespace)
    _suspend(cluster, job, False)
    job.wait(cluster, "Complete")


def test_the_deadline_stops_saves_and_fails(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("late", namespace).holds(stop_code=75).kwok(stop_for="4s").apply(cluster)
    job.wait(cluster, "Running")
    job.edit(cluster, activeDeadlineSeconds=1)
    stopping = job.until(cluster, lambda s: condition(s, "Suspended").get("reason") == "DeadlineExceeded")
    assert condition(stopping, "Failed") == {}, "it must be given the time to save"
    status = job.wait(cluster, "Failed")
    assert status["failure"]["cause"] == "DeadlineExceeded"
    eventually(lambda: not listed(cluster, "pods", namespace), "no pod is left")


def test_time_while_suspended_does_not_count(installed_cluster: Cluster, namespace: str) -> None:
    """By the times of a real Job; that such time ends no job is in tests/unit."""
    cluster = installed_cluster
    began = time.monotonic()
    job = FineTuneJob("patient", namespace).holds(stop_code=75).apply(cluster)
    job.wait(cluster, "Running")
    _suspend(cluster, job, True)
    job.wait(cluster, "Suspended")
    time.sleep(6)
    _suspend(cluster, job, False)
    job.wait(cluster, "Running")
    job.edit(cluster, activeDeadlineSeconds=1)
    status = job.wait(cluster, "Failed")
    assert status["failure"]["cause"] == "DeadlineExceeded"
    assert 1 <= status["activeSeconds"] < time.monotonic() - began - 3, "six seconds less, and each time is rounded"


def test_an_edit_before_training_replaces_the_job(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("too-big", namespace).finishes().having(resources={"gpusPerNode": 64}).apply(cluster)
    status = job.wait(cluster, "Waiting")
    assert condition(status, "Waiting")["reason"] == "WaitingForNodes"
    assert "Insufficient nvidia.com/gpu" in condition(status, "Waiting")["message"]
    job.having(resources={"gpusPerNode": 8}).apply(cluster)
    status = job.wait(cluster, "Complete")
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Stopped", "Finished"]
    assert status["gpus"] == 8


def test_what_decides_the_outcome_is_frozen_while_it_trains(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("frozen", namespace).holds().apply(cluster)
    job.until(cluster, lambda s: condition(s, "SpecFrozen").get("status") == "True")
    with pytest.raises(Refused, match="training has begun"):
        job.having(training={"learningRate": "1e-5"}).apply(cluster)


@pytest.mark.parametrize("how", ["node removed", "node not ready"])
def test_a_lost_node_does_not_hold_the_job(installed_cluster: Cluster, namespace: str, how: str) -> None:
    """A pod there stays Terminating for ever, and the Job controller waits for it: another Job does not."""
    cluster = installed_cluster
    node, spare = f"lost-{namespace}", f"spare-{namespace}"
    cluster.kwok.add_nodes([node, spare], labels={"pool": namespace}, taint=namespace)
    cluster.api.patch("nodes", spare, {"spec": {"unschedulable": True}})
    try:
        job = FineTuneJob("stranded", namespace).holds().kwok(never_stops="true")
        job.having(resources=pool(namespace)).apply(cluster)
        first = job.wait(cluster, "Running")
        cluster.api.patch("nodes", spare, {"spec": {"unschedulable": None}})
        if how == "node removed":
            cluster.kwok.remove_node(node)
        else:
            _not_ready(cluster, node)
        (pod,) = listed(cluster, "pods", namespace)
        cluster.api.delete("pods", pod["metadata"]["name"], namespace)
        status = job.until(cluster, lambda s: len(s["attempts"]) == 2 and s["phase"] == "Running")
        assert first["attempts"][0]["runId"] != status["attempts"][1]["runId"]
        assert status["attempts"][0]["cause"] == "NodeLost"
    finally:
        job.delete(cluster, "Foreground")
        cluster.kubectl("delete", "pods", "--all", "-n", namespace, "--force", "--grace-period=0", "--wait=false")
        for name in (node, spare):
            cluster.kubectl("delete", "node", name, "--ignore-not-found")


def _not_ready(cluster: Cluster, node: str) -> None:
    """As the node controller says of a node whose kubelet is silent; kwok's heartbeats for it are switched off first."""
    cluster.kubectl("annotate", "node", node, "kwok.x-k8s.io/node-")
    conditions = [
        {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "Kubelet is silent."}
    ]
    cluster.kubectl(
        *("patch", "node", node, "--subresource=status", "--type=strategic"),
        *("-p", json.dumps({"status": {"conditions": conditions}})),
    )
