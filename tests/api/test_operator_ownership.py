"""Two managers write one status, and neither takes from it what the other said."""

import json
from collections.abc import AsyncIterator

import pytest

from cluster.cluster import Cluster
from finetune_operator.credentials import Credentials
from finetune_operator.kube import FINETUNEJOBS, Conflict, Kube

from .jobs import FineTuneJob, Json, condition, listed
from .operators import USER

pytestmark = pytest.mark.usefixtures("operator")


@pytest.fixture
async def kube(installed_cluster: Cluster) -> AsyncIterator[Kube]:
    client = Kube(Credentials(str(installed_cluster.kubeconfig_for(USER))), identity="test")
    yield client
    await client.close()


def _checkpoint(step: int) -> Json:
    return {
        "latest": {"step": step, "uri": "s3://bucket/c", "digest": f"sha256:{step}", "time": "2026-01-31T12:00:00Z"}
    }


async def _report(kube: Kube, job: FineTuneJob, pod: str, step: int) -> None:
    """What the progress server applies when a pod has reported."""
    while True:
        live = await kube.get(FINETUNEJOBS(job.namespace, job.name))
        status = {
            "progress": {"attempt": 1, "pod": pod, "stage": "Training", "step": step, "totalSteps": 100},
            "metrics": [{"name": "loss", "value": f"0.{step}"}],
            "checkpoints": _checkpoint(step),
        }
        try:
            version = live["metadata"]["resourceVersion"]
            await kube.apply_status(
                FINETUNEJOBS(job.namespace, job.name), status, manager="finetune-progress", resource_version=version
            )
            return
        except Conflict:
            continue


async def test_checkpoints_survive_disruption_suspension_and_retry(
    installed_cluster: Cluster, namespace: str, kube: Kube
) -> None:
    cluster = installed_cluster
    words = {"code": 75, "step": 30, "totalSteps": 100, "checkpoints": _checkpoint(30)}
    job = FineTuneJob("owned", namespace).holds(stop_code=75).kwok(stop_message=json.dumps(words)).apply(cluster)
    job.wait(cluster, "Running")
    (pod,) = listed(cluster, "pods", namespace)
    await _report(kube, job, pod["metadata"]["name"], 20)

    cluster.api.delete("pods", pod["metadata"]["name"], namespace)
    status = job.until(cluster, lambda s: s["attempts"][-1].get("runs") == 2 and s["phase"] == "Running")
    assert status["checkpoints"] == _checkpoint(30), "the last words are newer than the last report"
    assert status["metrics"] == [{"name": "loss", "value": "0.20"}]

    job.edit(cluster, suspend=True)
    status = job.wait(cluster, "Suspended")
    assert status["checkpoints"] == _checkpoint(30)

    job.edit(cluster, suspend=False)
    job.until(cluster, lambda s: s["attempts"][-1].get("runs") == 3 and s["phase"] == "Running")
    (pod,) = listed(cluster, "pods", namespace, fields="status.phase=Running")
    await _report(kube, job, pod["metadata"]["name"], 40)
    job.edit(cluster, retries=7)
    status = job.until(cluster, lambda s: s["observedGeneration"] == 4)
    assert status["checkpoints"] == _checkpoint(40)
    assert status["progress"]["step"] == 40
    assert condition(status, "Running")["status"] == "True"
