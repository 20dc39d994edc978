"""From apply to Complete, the whole story: children, status, events, writes."""

import json
from collections import Counter

import pytest

from cluster.cluster import Cluster

from .jobs import FINISHED, FineTuneJob, condition, eventually, listed, told
from .operators import USER, Operator

pytestmark = pytest.mark.usefixtures("operator")


def test_a_job_completes_and_its_status_tells_the_story(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("support-bot", namespace).finishes("2s").holds().apply(cluster)
    job.wait(cluster, "Running")
    job.end(cluster)
    cluster.kubectl("wait", "ftj/support-bot", "-n", namespace, "--for=condition=Complete", "--timeout=90s")
    status = job.status(cluster)
    assert status["phase"] == "Complete"
    assert status["output"] == FINISHED["output"]
    assert status["progress"]["display"] == "100 % (120/120)"
    assert status["metrics"] == FINISHED["metrics"]
    assert status["gpus"] == 1
    assert status["observedGeneration"] == 1
    (attempt,) = status["attempts"]
    assert (attempt["outcome"], attempt["runs"], attempt["lastStep"]) == ("Finished", 1, 120)
    assert attempt["gpuSeconds"] >= 2
    assert status["usage"]["gpuSeconds"] == attempt["gpuSeconds"]
    assert "Reconciling" not in {each["type"] for each in status["conditions"]}
    assert condition(status, "SpecFrozen")["status"] == "True"
    assert condition(status, "Running")["status"] == "False"
    eventually(lambda: "Completed" in told(cluster, namespace), "the last event")
    assert told(cluster, namespace) == ["Created", "PodsRunning", "Completed"]
    events = cluster.kubectl("describe", "ftj", "support-bot", "-n", namespace).rpartition("Events:")[2]
    assert all(reason in events for reason in told(cluster, namespace))


def test_children_are_owned_confined_and_named_by_uid(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    job = FineTuneJob("children", namespace).holds().having(resources={"nodes": 2, "gpusPerNode": 4}).apply(cluster)
    job.wait(cluster, "Running")
    uid = job.read(cluster)["metadata"]["uid"]
    selector = f"finetune.dev/uid={uid}"
    children = listed(cluster, "jobs,services,configmaps", namespace, selector)
    assert [each["kind"] for each in children] == ["Job", "Service", "ConfigMap"]
    for child in children:
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, True)
    batch_job, service, config_map = children
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert config_map["immutable"] is True
    resolved = json.loads(config_map["data"]["job.json"])
    assert (resolved["uid"], resolved["spec"]["method"]["lora"]["rank"]) == (uid, 16)
    assert (batch_job["spec"]["backoffLimit"], batch_job["spec"]["podReplacementPolicy"]) == (0, "Failed")
    pods = listed(cluster, "pods", namespace, selector)
    assert sorted(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for pod in pods) == ["0", "1"]
    for pod in pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_plain_path_costs_eight_writes(installed_cluster: Cluster, namespace: str, operator: Operator) -> None:
    cluster = installed_cluster
    mark = cluster.audit.mark()
    job = FineTuneJob("counted", namespace).finishes().holds().apply(cluster)
    job.wait(cluster, "Running")
    job.end(cluster)
    job.wait(cluster, "Complete")
    eventually(lambda: "Completed" in told(cluster, namespace), "the last event")

    def writes() -> Counter[str]:
        return Counter(
            f"{event.verb} {event.resource}{event.subresource and '/' + event.subresource}"
            for event in cluster.audit.since(mark, user=USER, namespace=namespace)
            if event.is_write
        )

    eventually(lambda: writes()["create events"] == 3, "the audit log tells of it a moment later")
    assert writes() == {
        "create configmaps": 1,
        "create jobs": 1,
        "patch finetunejobs/status": 3,
        "create events": 3,
    }


def test_the_same_name_again_in_mid_run_adopts_nothing(installed_cluster: Cluster, namespace: str) -> None:
    cluster = installed_cluster
    first = FineTuneJob("again", namespace).holds().apply(cluster)
    first.wait(cluster, "Running")
    old_uid = first.read(cluster)["metadata"]["uid"]
    (old_job,) = listed(cluster, "jobs", namespace)
    first.delete(cluster, "Orphan")
    eventually(lambda: not listed(cluster, "finetunejobs", namespace), "the first one is gone")
    second = FineTuneJob("again", namespace).finishes().apply(cluster)
    status = second.wait(cluster, "Complete")
    assert status["attempts"][0]["jobName"] != old_job["metadata"]["name"]
    assert second.read(cluster)["metadata"]["uid"] != old_uid
    assert len(status["attempts"]) == 1
