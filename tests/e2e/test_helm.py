"""The chart on a real node: two replicas in containers, confined, reachable by the names that pods use, and gone when uninstalled."""

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.charts import Helm
from api.jobs import eventually
from api.operators import CHART
from cluster.cluster import Cluster, KubectlError
from cluster.registry import PushedImage

RELEASE = "finetune"
CALL = """
import ssl, sys, urllib.error, urllib.request
context = ssl.create_default_context(cadata=sys.stdin.read())
for _ in range(6):
    try:
        urllib.request.urlopen(urllib.request.Request(sys.argv[1], data=b"{}", method="POST"), context=context, timeout=10)
    except urllib.error.HTTPError as answer:
        print(answer.code)
"""
"""Both replicas, as the Service chooses."""
SCRAPE = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


@pytest.fixture
def system(cluster: Cluster, operator_image: PushedImage, tmp_path: Path) -> Iterator[str]:
    """A namespace under the restricted profile with a release in it that is ready."""
    helm = Helm(tmp_path, cluster)
    name = f"system-{secrets.token_hex(3)}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    images = f"image.reference={operator_image.reference},trainer.image=trainer.test/finetune-trainer:1"
    switches = f"watchNamespaces={{{name}}},rbac.userRoles=false,policy.enabled=false"
    try:
        helm(
            *("upgrade", "--install", RELEASE, CHART, "-n", name, "--set", images, "--set", switches),
            *("--take-ownership", "--force-conflicts", "--wait", "--timeout=3m"),
        )
        yield name
    finally:
        helm("uninstall", RELEASE, "-n", name, "--ignore-not-found", "--wait")
        cluster.kubectl("delete", "namespace", name, "--wait=false")


def test_a_release_is_ready_reachable_and_confined_and_leaves_crd_and_ca(
    cluster: Cluster, system: str, tmp_path: Path
) -> None:
    pods = json.loads(cluster.kubectl("get", "pods", "-n", system, "-o", "json"))["items"]
    statuses = [status for pod in pods for status in pod["status"]["containerStatuses"]]
    assert [(status["ready"], status["restartCount"]) for status in statuses] == [(True, 0), (True, 0)]
    inside = ("exec", "-i", "-n", system, f"deployment/{RELEASE}", "--")

    data = json.loads(cluster.kubectl("get", "secret", f"{RELEASE}-progress", "-n", system, "-o", "json"))["data"]
    ca = base64.b64decode(data["ca.crt"]).decode()
    path = "/v1alpha1/namespaces/team/finetunejobs/a/progress"
    url = f"https://{RELEASE}-progress.{system}.svc:8443{path}"
    assert cluster.kubectl(*inside, "python", "-c", CALL, url, stdin=ca).split() == ["401"] * 6

    def leaders() -> list[str]:
        urls = [f"http://{pod['status']['podIP']}:8080/metrics" for pod in pods]
        metrics = [cluster.kubectl(*inside, "python", "-c", SCRAPE, url).splitlines() for url in urls]
        return sorted(line for lines in metrics for line in lines if line.startswith("finetune_leader "))

    eventually(lambda: leaders() == ["finetune_leader 0.0", "finetune_leader 1.0"], "one of the two leads", seconds=30)

    with pytest.raises(KubectlError, match="Read-only file system"):
        cluster.kubectl(*inside, "touch", "/app/x")
    assert cluster.kubectl(*inside, "id", "-u").strip() == "10001"

    Helm(tmp_path, cluster)("uninstall", RELEASE, "-n", system, "--wait")
    cluster.kubectl("wait", "--for=delete", "pods", "--all", "-n", system, "--timeout=60s")
    kinds = "deployments,services,secrets,configmaps,leases,poddisruptionbudgets,roles,rolebindings,serviceaccounts"
    left = cluster.kubectl("get", kinds, "-n", system, "-o", "name").split()
    of_the_namespace = {"configmap/kube-root-ca.crt", "serviceaccount/default"}
    assert set(left) - of_the_namespace == {f"secret/{RELEASE}-progress", f"lease.coordination.k8s.io/{RELEASE}"}
    assert "finetunejobs.finetune.dev" in cluster.kubectl("get", "crd", "-o", "name")
