"""How attempts end: codes, messages, retries, edits; what is never Complete."""

import json
from typing import Any

import pytest

from cluster.cluster import Cluster

from .jobs import FINISHED, FineTuneJob, condition, eventually, listed

pytestmark = pytest.mark.usefixtures("operator")

_AT_DATA = {
    "code": 65,
    "message": "column 'text' is missing",
    "evidence": {"type": "KeyError", "file": "a.py", "line": 7},
}


@pytest.mark.parametrize(
    ("code", "message", "cause", "said"),
    [
        pytest.param(64, {"code": 64, "message": "model.uri: no such repository"}, "UserError", "no such", id="user"),
        pytest.param(65, _AT_DATA, "DataError", "column 'text'", id="data"),
        pytest.param(66, {"code": 66, "message": "loss is not finite"}, "Diverged", "not finite", id="diverged"),
        pytest.param(67, {"code": 67, "message": "CUDA out of memory"}, "OutOfGpuMemory", "CUDA", id="gpu-memory"),
        pytest.param(137, None, "OutOfMemory", "resources.memory", id="out-of-memory"),
        pytest.param(0, None, "NoVerdict", "no record", id="zero-without-a-record"),
        pytest.param(0, {"code": 75, "message": "stopped"}, "NoVerdict", "no record", id="zero-with-another-record"),
    ],
)
def test_what_is_never_retried(
    installed_cluster: Cluster, namespace: str, code: int, message: dict[str, Any] | None, cause: str, said: str
) -> None:
    job = FineTuneJob("failing", namespace).exits(code, message).apply(installed_cluster)
    status = job.wait(installed_cluster, "Failed")
    assert (status["phase"], status["failure"]["cause"]) == ("Failed", cause)
    assert said in status["failure"]["message"]
    assert status["failure"]["exitCode"] == code
    assert status["failure"]["nextStep"]
    assert condition(status, "Stalled")["reason"] == condition(status, "Failed")["reason"] == cause
    assert condition(status, "Complete") == {}
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Failed"]
    assert len(listed(installed_cluster, "jobs", namespace)) == 1


@pytest.mark.parametrize(
    ("code", "cause"),
    [pytest.param(70, "InternalError", id="fault"), pytest.param(1, "Killed", id="unknown code of our trainer")],
)
def test_what_may_pass_is_counted_against_retries(
    installed_cluster: Cluster, namespace: str, code: int, cause: str
) -> None:
    job = FineTuneJob("retried", namespace).exits(code).having(retries=1).apply(installed_cluster)
    status = job.wait(installed_cluster, "Failed", seconds=60)
    assert status["failure"]["cause"] == cause
    assert [attempt["cause"] for attempt in status["attempts"]] == [cause, cause]
    assert status["countedFailures"] == 2
    assert status["causeCounts"] == [{"cause": cause, "count": 2}]


def test_a_failed_job_is_mended_by_editing_and_applying(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("mended", namespace).exits(65, _AT_DATA).apply(cluster)
    failed = job.wait(cluster, "Failed")
    job.having(dataset={"train": [{"uri": "s3://bucket/right.jsonl"}]}).finishes().apply(cluster)
    status = job.wait(cluster, "Complete")
    assert "failure" not in status
    assert condition(status, "Failed") == condition(status, "Stalled") == {}
    first, second = status["attempts"]
    assert first == failed["attempts"][0]
    assert (second["number"], second["generation"], second["outcome"]) == (2, 2, "Finished")
    assert first["specDigest"] != second["specDigest"]


def test_the_retry_annotation_tries_once_for_each_value(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("asked", namespace).exits(66).apply(cluster)
    job.wait(cluster, "Failed")
    for number in (2, 3):
        value = f"finetune.dev/retry=try-{number}"
        cluster.kubectl("annotate", "finetunejob", "asked", "-n", namespace, value, "--overwrite")
        status = job.until(
            cluster, lambda s, n=number: len(s["attempts"]) == n and condition(s, "Failed").get("status") == "True"
        )
        assert status["attempts"][-1]["cause"] == "Diverged"
    digests = {attempt["specDigest"] for attempt in status["attempts"]}
    assert len(digests) == 1


def test_a_deleted_pod_is_replaced_in_the_same_job(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("disrupted", namespace).holds(stop_code=75).apply(cluster)
    job.wait(cluster, "Running")
    (pod,) = listed(cluster, "pods", namespace)
    cluster.api.delete("pods", pod["metadata"]["name"], namespace)
    status = job.until(cluster, lambda s: s["attempts"][-1].get("runs") == 2 and s["phase"] == "Running")
    assert len(status["attempts"]) == len(listed(cluster, "jobs", namespace)) == 1
    assert status["causeCounts"] == [{"cause": "Disruption", "count": 1}]
    assert status.get("countedFailures") is None


def test_a_pod_that_dies_of_its_deletion_starts_another_attempt_for_free(
    installed_cluster: Cluster, namespace: str
) -> None:
    """143 is in no rule of the Job's policy, so the Job fails; the operator sees that somebody deleted the pod."""
    cluster = installed_cluster
    job = FineTuneJob("evicted", namespace).holds(stop_code=143).having(retries=0).apply(cluster)
    job.wait(cluster, "Running")
    (pod,) = listed(cluster, "pods", namespace)
    cluster.api.delete("pods", pod["metadata"]["name"], namespace)
    status = job.until(cluster, lambda s: len(s["attempts"]) == 2 and s["phase"] == "Running")
    assert status["attempts"][0]["cause"] == "Disruption"
    assert status.get("countedFailures") is None


def test_a_program_that_ends_with_0_on_sigterm_is_never_complete(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("program", namespace).holds(stop_code=0)
    job.body["spec"] = {"runtime": {"image": "user/program", "command": ["run"], "annotations": job.annotations}}
    job.apply(cluster).wait(cluster, "Running")
    (pod,) = listed(cluster, "pods", namespace)
    assert pod["spec"]["containers"][0]["command"] == ["/finetune/init/finetune-init", "--", "run"]
    cluster.api.delete("pods", pod["metadata"]["name"], namespace)
    status = job.wait(cluster, "Failed")
    assert status["failure"]["cause"] == "NoVerdict"


def test_the_last_word_is_taken_over_from_progress_when_the_message_is_lost(
    installed_cluster: Cluster, namespace: str
) -> None:
    cluster = installed_cluster
    job = FineTuneJob("lost-message", namespace).holds().apply(cluster)
    job.wait(cluster, "Running")
    progress = {"status": {"progress": {"attempt": 1, "stage": "Finished", "step": 9, "totalSteps": 9}}}
    patch = ("patch", "finetunejob", job.name, "-n", namespace, "--subresource=status", "--type=merge")
    cluster.kubectl(*patch, "--field-manager=finetune-progress", "-p", json.dumps(progress))
    job.end(cluster)
    status = job.wait(cluster, "Complete")
    assert status["progress"]["display"] == "100 % (9/9)"
    assert status["output"] == {"uri": "s3://bucket/out"}


def test_a_reused_output_completes_and_says_so(installed_cluster: Cluster, namespace: str) -> None:
    record = {**FINISHED, "output": {**FINISHED["output"], "reused": True}}
    job = FineTuneJob("reused", namespace).finishes(record=record).apply(installed_cluster)
    status = job.wait(installed_cluster, "Complete")
    assert condition(status, "Complete")["reason"] == "OutputReused"


def test_cleanup_removes_the_children_and_keeps_the_record(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("cleaned", namespace).finishes().having(cleanup={"afterSeconds": 6}).apply(cluster)
    job.wait(cluster, "Complete")
    assert listed(cluster, "jobs", namespace)
    selector = "finetune.dev/job=cleaned"
    eventually(lambda: not listed(cluster, "jobs,pods,services,configmaps", namespace, selector), "children gone")
    assert job.status(cluster)["phase"] == "Complete"
