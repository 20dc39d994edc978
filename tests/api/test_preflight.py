"""A preflight on a real control plane: before any pod asks for a GPU, with simulated pods that pass, fail, are lost and are stopped."""

import pytest

from cluster.cluster import Cluster

from .jobs import FineTuneJob, Json, condition, eventually, listed, told

pytestmark = pytest.mark.usefixtures("operator")

REPORT: Json = {
    "rows": 900,
    "evaluationRows": 18,
    "tokens": 120_000,
    "steps": 120,
    "parameters": 1_200_000_000,
    "trainedParameters": 11_000_000,
    "memory": {"weights": "2300Mi", "training": "200Mi", "activations": "7000Mi", "total": "9500Mi"},
}
WRONG: Json = {"code": 65, "message": "train.jsonl row 7: messages is missing"}


def pods(cluster: Cluster, namespace: str, *, checks: bool) -> list[Json]:
    """Pods of preflights, or those that train."""
    return listed(cluster, "pods", namespace, labels=("" if checks else "!") + "finetune.dev/preflight")


def test_it_passes_before_a_gpu_is_asked_for_and_the_job_trains(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    message = {"code": 0, "preflight": REPORT, "inputs": {"rows": 900}}
    job = FineTuneJob("checked", namespace).checked(message=message, preflight_hold="true").finishes().holds()
    job.apply(cluster)
    status = job.until(cluster, lambda status: status.get("phase") == "Preflight")
    assert status["preflight"]["state"] == "Running" and "attempts" not in status
    (pod,) = eventually(lambda: pods(cluster, namespace, checks=True), "its pod")
    assert not pods(cluster, namespace, checks=False)
    resources = pod["spec"]["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in {**resources["limits"], **resources["requests"]}
    job.end(cluster)
    job.wait(cluster, "Running")
    job.end(cluster)
    status = job.wait(cluster, "Complete")
    assert status["preflight"]["state"] == "Passed"
    assert status["preflight"]["report"] == REPORT
    assert condition(status, "PreflightPassed")["status"] == "True"
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Finished"]
    eventually(lambda: "PodsRunning" in told(cluster, namespace), "its events")
    story = ("PreflightRunning", "PreflightPassed", "PodsRunning")
    assert tuple(reason for reason in told(cluster, namespace) if reason in story) == story
    assert len(pods(cluster, namespace, checks=True)) == len(pods(cluster, namespace, checks=False)) == 1


def test_without_a_word_a_job_with_gpus_is_checked_and_one_without_is_not(
    installed_cluster: Cluster, namespace: str
) -> None:
    for name, gpus in (("gpu", 1), ("cpu", 0)):
        job = FineTuneJob(name, namespace).finishes().having(resources={"gpusPerNode": gpus})
        del job.spec["preflight"]
        status = job.apply(installed_cluster).wait(installed_cluster, "Complete")
        assert ("preflight" in status) == bool(gpus)
        assert status["resolved"]["preflight"] == ("Required" if gpus else "Skip")


def test_what_is_wrong_fails_the_job_and_an_edit_checks_again(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("wrong", namespace).checked(65, WRONG).finishes().apply(cluster)
    status = job.wait(cluster, "Failed")
    assert (status["failure"]["cause"], status["failure"]["message"]) == ("DataError", WRONG["message"])
    assert condition(status, "PreflightPassed")["reason"] == "PreflightFailed"
    assert "attempts" not in status and "usage" not in status
    assert not pods(cluster, namespace, checks=False), "no GPU was asked for"

    job.having(dataset={"train": [{"uri": "s3://bucket/right.jsonl"}]}).checked(
        message={"code": 0, "preflight": REPORT}
    )
    status = job.apply(cluster).wait(cluster, "Complete")
    assert (status["preflight"]["number"], status["preflight"]["state"]) == (2, "Passed")
    assert "failure" not in status


def test_a_deleted_pod_is_replaced_and_costs_nothing(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("lost", namespace).checked(preflight_hold="true").finishes().having(retries=0).apply(cluster)
    (pod,) = eventually(
        lambda: [p for p in pods(cluster, namespace, checks=True) if p["status"]["phase"] == "Running"], "it runs"
    )
    cluster.api.delete("pods", pod["metadata"]["name"], namespace)
    status = job.until(cluster, lambda status: status.get("preflight", {}).get("losses"))
    assert "failure" not in status and "attempts" not in status
    status = job.until(cluster, lambda status: status["preflight"]["number"] == 2)
    assert status["preflight"]["state"] == "Running"


def test_suspension_takes_its_pod_away_and_deletion_everything(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("paused", namespace).checked(preflight_hold="true").finishes().apply(cluster)
    eventually(lambda: pods(cluster, namespace, checks=True), "it runs")
    job.having(suspend=True).apply(cluster)
    status = job.wait(cluster, "Suspended")
    assert (status["phase"], status["preflight"]["state"]) == ("Suspended", "Stopped")
    eventually(
        lambda: not listed(cluster, "pods,jobs,configmaps", namespace, labels="finetune.dev/job"), "nothing is left"
    )
    job.having(suspend=False).apply(cluster)
    job.until(cluster, lambda status: status["preflight"]["number"] == 2)
    job.delete(cluster)
    eventually(
        lambda: not listed(cluster, "pods,jobs,configmaps", namespace, labels="finetune.dev/job"), "nothing is left"
    )
