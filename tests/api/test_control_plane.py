"""The api tier's cluster itself: what the other tests of this tier build on."""

import json

import pytest

from cluster.cluster import Cluster, KubectlError


def pod_job(annotations: dict[str, str]) -> str:
    """A Job of one restricted pod of one GPU, with annotations that say how the simulated pod ends."""
    return json.dumps(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "job"},
            "spec": {
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "template": {
                    "metadata": {"annotations": {f"kwok.finetune.dev/{key}": v for key, v in annotations.items()}},
                    "spec": {
                        "restartPolicy": "Never",
                        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                        "containers": [
                            {
                                "name": "main",
                                "image": "none",
                                "resources": {"limits": {"nvidia.com/gpu": 1}},
                                "securityContext": {
                                    "allowPrivilegeEscalation": False,
                                    "capabilities": {"drop": ["ALL"]},
                                },
                            }
                        ],
                    },
                },
            },
        }
    )


def terminated(cluster: Cluster, namespace: str) -> dict[str, object]:
    path = "jsonpath={.items[0].status.containerStatuses[0].state.terminated}"
    answer = cluster.kubectl("-n", namespace, "get", "pods", "-o", path)
    parsed: dict[str, object] = json.loads(answer or "{}")
    return parsed


@pytest.mark.parametrize(
    ("annotations", "condition", "exit_code"),
    [({}, "Complete", 0), ({"exit-code": "3", "message": '{"cause": "OutOfMemory"}'}, "Failed", 3)],
    ids=["success", "failure"],
)
def test_a_simulated_pod_ends_as_its_annotations_say(
    api_cluster: Cluster, namespace: str, annotations: dict[str, str], condition: str, exit_code: int
) -> None:
    api_cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=pod_job(annotations))
    api_cluster.kubectl("-n", namespace, "wait", f"--for=condition={condition}", "--timeout=30s", "job/job")
    end = terminated(api_cluster, namespace)
    assert (end["exitCode"], end.get("message", "")) == (exit_code, annotations.get("message", ""))


def test_a_deleted_pod_fails_with_its_stop_code_before_it_goes(api_cluster: Cluster, namespace: str) -> None:
    annotations = {"hold": "true", "stop-for": "2s", "stop-exit-code": "64"}
    api_cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=pod_job(annotations))
    api_cluster.kubectl("-n", namespace, "wait", "--for=jsonpath={.status.ready}=1", "--timeout=30s", "job/job")
    mark = api_cluster.audit.mark()
    api_cluster.kubectl("-n", namespace, "delete", "pod", "--selector=job-name=job", "--wait=true", "--timeout=30s")
    api_cluster.kubectl("-n", namespace, "wait", "--for=condition=Failed", "--timeout=30s", "job/job")
    patches = api_cluster.audit.since(mark, user="kwok", verb="patch", subresource="status", namespace=namespace)
    assert len(patches) == 1, "the pod's end was written once, before the pod went"


def test_the_audit_log_tells_who_created_what(api_cluster: Cluster, namespace: str) -> None:
    mark = api_cluster.audit.mark()
    api_cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=pod_job({}))
    with pytest.raises(KubectlError, match="already exists"):
        api_cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=pod_job({}))
    events = api_cluster.audit.since(mark, verb="create", resource="jobs", namespace=namespace)
    assert [(event.user, event.name, event.code) for event in events] == [("admin", "job", 201), ("admin", "job", 409)]


def test_a_user_has_no_rights_but_those_given(api_cluster: Cluster, namespace: str) -> None:
    ada = f"--kubeconfig={api_cluster.kubeconfig_for('ada', 'scientists')}"
    with pytest.raises(KubectlError, match='User "ada" cannot list resource "jobs"'):
        api_cluster.kubectl(ada, "-n", namespace, "get", "jobs")
    api_cluster.kubectl("-n", namespace, "create", "rolebinding", "view", "--clusterrole=view", "--group=scientists")
    api_cluster.kubectl(ada, "-n", namespace, "get", "jobs")


def test_owner_references_are_enforced(api_cluster: Cluster, namespace: str) -> None:
    """Blocking the deletion of an owner takes the right to update its finalizers."""
    api_cluster.kubectl("-n", namespace, "create", "configmap", "owner")
    uid = api_cluster.kubectl("-n", namespace, "get", "configmap", "owner", "-o", "jsonpath={.metadata.uid}")
    rights = ("--verb=create,get,update,patch", "--resource=configmaps")
    api_cluster.kubectl("-n", namespace, "create", "role", "writer", *rights)
    api_cluster.kubectl("-n", namespace, "create", "rolebinding", "writer", "--role=writer", "--user=bob")
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid, "blockOwnerDeletion": True}
    child = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "child", "ownerReferences": [owner]}}
    bob = f"--kubeconfig={api_cluster.kubeconfig_for('bob')}"
    with pytest.raises(KubectlError, match="cannot set blockOwnerDeletion"):
        api_cluster.kubectl(bob, "-n", namespace, "create", "-f", "-", stdin=json.dumps(child))
