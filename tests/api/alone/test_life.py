"""What needs the operator or the API server stopped, or fewer rights than it has."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from cluster.cluster import Cluster, KubectlError
from finetune_operator.cache import Cache
from finetune_operator.credentials import Credentials
from finetune_operator.kube import Kube
from finetune_operator.progress_server.writer import ProgressWriter

from ..jobs import FineTuneJob, condition, eventually, listed
from ..operators import USER, Operator
from ..reporting import ours, reported, run_of


@pytest.fixture(autouse=True)
def leader(operator: Operator) -> None:
    """One that leads at the start of each test: a kubelet would start it again, too, when it could not renew its Lease."""
    if not operator.is_running:
        operator.start()


@pytest.fixture
async def kube(installed_cluster: Cluster) -> AsyncIterator[Kube]:
    """A client of this process, with an administrator's rights."""
    client = Kube(Credentials(str(installed_cluster.kubeconfig)))
    yield client
    await client.close()


def test_applied_again_or_seen_by_a_restarted_operator_it_never_trains_again(
    installed_cluster: Cluster, namespace: str, operator: Operator
) -> None:
    cluster = installed_cluster
    job = FineTuneJob("once", namespace).finishes().apply(cluster)
    before = job.wait(cluster, "Complete")
    mark = cluster.audit.mark()
    job.apply(cluster)
    operator.stop()
    operator.start()
    FineTuneJob("later", namespace).finishes().apply(cluster).wait(cluster, "Complete")
    created = {event.name for event in cluster.audit.since(mark, verb="create", resource="jobs", namespace=namespace)}
    assert all(name.startswith("later-") for name in created)
    assert job.status(cluster) == before


def test_deleting_it_leaves_nothing_also_without_an_operator(
    installed_cluster: Cluster, namespace: str, operator: Operator
) -> None:
    cluster = installed_cluster
    job = FineTuneJob("gone", namespace).holds().apply(cluster)
    job.wait(cluster, "Running")
    operator.stop()
    try:
        job.delete(cluster)
        selector = "finetune.dev/job=gone"
        # The garbage collector learns of a new kind within 30 s.
        eventually(
            lambda: not listed(cluster, "jobs,pods,services,configmaps", namespace, selector),
            "children gone",
            seconds=60,
        )
    finally:
        operator.start()


def _may_update_finalizers(cluster: Cluster, namespace: str) -> bool:
    asked = ("auth", "can-i", "update", "finetunejobs.finetune.dev", "--subresource=finalizers", f"--as={USER}")
    try:
        return cluster.kubectl(*asked, "-n", namespace).strip() == "yes"
    except KubectlError:  # "no" is an exit code of 1
        return False


def test_an_operator_without_the_right_to_finalizers_makes_no_children(
    installed_cluster: Cluster, namespace: str
) -> None:
    """OwnerReferencesPermissionEnforcement: blockOwnerDeletion needs update on finetunejobs/finalizers."""
    cluster = installed_cluster
    role = cluster.api.get("clusterroles", "finetune-operator.finetune-system")
    without = [rule for rule in role["rules"] if rule["resources"] != ["finetunejobs/finalizers"]]
    assert len(without) == len(role["rules"]) - 1
    cluster.kubectl("replace", "-f", "-", stdin=json.dumps({**role, "rules": without}))
    eventually(lambda: not _may_update_finalizers(cluster, namespace), "the authorizer has heard of it")
    try:
        job = FineTuneJob("refused", namespace).finishes().apply(cluster)
        status = job.wait(cluster, "Waiting")
        assert "cannot set blockOwnerDeletion" in condition(status, "Waiting")["message"]
        assert not listed(cluster, "jobs", namespace)
    finally:
        fresh = cluster.api.get("clusterroles", "finetune-operator.finetune-system")
        cluster.kubectl("replace", "-f", "-", stdin=json.dumps({**fresh, "rules": role["rules"]}))
    job.wait(cluster, "Complete", seconds=90)


def test_another_operator_goes_on_with_it(installed_cluster: Cluster, namespace: str, operator: Operator) -> None:
    cluster = installed_cluster
    job = FineTuneJob("handed-on", namespace).checked(after="6s").finishes().apply(cluster)
    job.until(cluster, lambda status: status.get("preflight"))
    operator.kill()
    operator.start()
    status = job.wait(cluster, "Complete")
    assert status["preflight"]["number"] == 1, "one preflight, made once"
    assert len(listed(cluster, "pods", namespace, labels="finetune.dev/preflight")) == 1


async def test_an_api_server_that_is_away_loses_no_report(
    installed_cluster: Cluster, namespace: str, operator: Operator, kube: Kube
) -> None:
    cluster = installed_cluster
    job = FineTuneJob("patient", namespace).holds().apply(cluster)
    run = await run_of(cluster, job)
    writer = ProgressWriter(kube, Cache(), interval_seconds=1)
    with cluster.apiserver.stopped():
        writer.submit(reported(run, ours(7)))
        await asyncio.sleep(0.5)
    await asyncio.to_thread(job.until, cluster, lambda s: s.get("progress", {}).get("step") == 7, 20)
    await writer.close()
