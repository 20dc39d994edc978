"""Operators killed, stopped and doubled, API servers restarted: each job runs once, and a deposed leader's writes are refused."""

import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from cluster.cluster import Cluster, KubectlError
from finetune_operator import act, clock
from finetune_operator.cache import Cache
from finetune_operator.credentials import Credentials
from finetune_operator.decide import decide
from finetune_operator.events import EventRecorder
from finetune_operator.kube import FINETUNEJOBS, Conflict, Kube
from finetune_operator.observe import observe
from finetune_operator.settings import Settings
from finetune_operator.state import State

from ..jobs import FineTuneJob, eventually, listed
from ..operators import NAMESPACE, USER, Operator


@pytest.fixture
def replicas(installed_cluster: Cluster, log_folder: Path) -> Iterator[list[Operator]]:
    """Two that are not started yet; whatever runs at the end is ended."""
    both = [Operator(installed_cluster, log_folder / f"replica-{n}", f"replica-{n}") for n in range(2)]
    yield both
    for each in both:
        if each.is_running:
            each.signal(signal.SIGCONT)
            each.stop()


def _created(cluster: Cluster, mark: int, namespace: str, kind: str = "jobs") -> Counter[str]:
    """Names of objects whose creation by an operator the API server has answered with 201, with how often."""
    accepted = cluster.audit.since(mark, verb="create", resource=kind, namespace=namespace, user=USER, code=201)
    return Counter(event.name or event.raw["requestURI"] for event in accepted)


def _complete(cluster: Cluster, namespace: str) -> int:
    return sum(job.get("status", {}).get("phase") == "Complete" for job in listed(cluster, "finetunejobs", namespace))


def _childless(cluster: Cluster, namespace: str) -> set[str]:
    """Names of Jobs that status tells of, and that were not made."""
    attempts = [
        a for job in listed(cluster, "finetunejobs", namespace) for a in job.get("status", {}).get("attempts", ())
    ]
    return {a["jobName"] for a in attempts} - {job["metadata"]["name"] for job in listed(cluster, "jobs", namespace)}


def _start_what_ended(*replicas: Operator) -> None:
    """As a kubelet does: a leader that could not renew its Lease in time, on a busy machine or without an API server, ends."""
    for replica in replicas:
        if not replica.is_running:
            replica.start(wait=False)


def _apply_many(cluster: Cluster, namespace: str, numbers: Iterable[int]) -> None:
    """Every tenth of two nodes: these have a Service too."""
    for n in numbers:
        job = FineTuneJob(f"job-{n}", namespace).finishes("1s")
        cluster.api.create("finetunejobs", job.having(resources={"nodes": 1 if n % 10 else 2}).body, namespace)


def test_killed_in_mid_reconcile_again_and_again_each_job_still_runs_once(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator]
) -> None:
    cluster, operator = installed_cluster, replicas[0]
    begin = cluster.audit.mark()
    torn: set[str] = set()
    for life, seconds in enumerate((0.0, 0.02, 0.05, 0.1, 0.3)):  # each has something to write
        _apply_many(cluster, namespace, range(6 * life, 6 * life + 6))
        writes = partial(
            cluster.audit.since, cluster.audit.mark(), user=USER, namespace=namespace, subresource="status"
        )
        operator.start(wait=False)
        eventually(writes, "its first write", every=0.02)
        time.sleep(seconds)
        operator.kill()
        torn |= _childless(cluster, namespace)
    operator.start()
    eventually(lambda: _complete(cluster, namespace) == 30, "all complete", every=1)
    created = _created(cluster, begin, namespace)
    assert set(created.values()) == {1}
    assert torn & set(created), "a later life made what an earlier one had only written into status"
    for job in listed(cluster, "finetunejobs", namespace):
        assert [attempt["number"] for attempt in job["status"]["attempts"]] == [1]
    stories = Counter(
        (event["regarding"]["name"], event["reason"])
        for event in listed(cluster, "events.events.k8s.io", namespace)
        if event["regarding"]["kind"] == "FineTuneJob"
    )
    assert set(stories.values()) == {1}, "each turn of the story is told once"


def test_deletion_at_any_moment_leaves_nothing(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator]
) -> None:
    cluster, operator = installed_cluster, replicas[0].start()
    chance = random.Random(11)
    _apply_many(cluster, namespace, range(20))
    for number in chance.sample(range(20), 20):
        FineTuneJob(f"job-{number}", namespace).delete(cluster)
        time.sleep(chance.uniform(0, 0.1))
        if number == 10:
            operator.kill()
            operator.start(wait=False)
    selector = "finetune.dev/job"
    eventually(
        lambda: not listed(cluster, "jobs,pods,services,configmaps", namespace, selector), "nothing is left", seconds=60
    )
    assert not listed(cluster, "finetunejobs", namespace)


def test_an_operator_of_some_namespaces_leaves_others_alone(
    installed_cluster: Cluster, namespace: str, log_folder: Path
) -> None:
    cluster = installed_cluster
    operator = Operator(cluster, log_folder / "narrow", "narrow", watch_namespaces=namespace).start()
    try:
        elsewhere = FineTuneJob("elsewhere", "default").finishes().apply(cluster)
        FineTuneJob("here", namespace).finishes().apply(cluster).wait(cluster, "Complete")
        assert elsewhere.status(cluster) == {}
    finally:
        operator.stop()
        elsewhere.delete(cluster)


def test_the_api_server_can_be_away_for_a_while(api_cluster: Cluster, namespace: str) -> None:
    api_cluster.kubectl("-n", namespace, "create", "configmap", "kept")
    with api_cluster.apiserver.stopped():
        time.sleep(1)
        with pytest.raises(KubectlError, match="refused"):
            api_cluster.kubectl("-n", namespace, "get", "configmap", "kept")
    assert "kept" in api_cluster.kubectl("-n", namespace, "get", "configmap", "kept")


def test_an_api_server_that_restarts_is_waited_for(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator]
) -> None:
    cluster, operator = installed_cluster, replicas[0].start()
    mark = cluster.audit.mark()
    running = FineTuneJob("running", namespace).finishes("12s").apply(cluster)
    running.wait(cluster, "Running")
    with cluster.apiserver.stopped():
        time.sleep(2)
    late = FineTuneJob("late", namespace).finishes().apply(cluster)

    def complete() -> bool:
        _start_what_ended(operator)
        return _complete(cluster, namespace) == 2

    eventually(complete, "both complete", seconds=240)
    for job in (running, late):
        assert [attempt["runs"] for attempt in job.status(cluster)["attempts"]] == [1]
    assert set(_created(cluster, mark, namespace).values()) == {1}


def test_an_api_server_that_stays_away_ends_the_leader_and_a_later_one_goes_on(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator]
) -> None:
    cluster, operator = installed_cluster, replicas[0].start()
    job = FineTuneJob("orphaned", namespace).finishes("15s").apply(cluster)
    job.wait(cluster, "Running")
    with cluster.apiserver.stopped():
        deadline = time.monotonic() + 15
        while operator.is_running:
            assert time.monotonic() < deadline, "it must end at its renew deadline"
            time.sleep(0.1)
    assert "could not be renewed" in operator.log.read_text()
    operator.start()
    assert job.wait(cluster, "Complete")["attempts"][0]["runs"] == 1


def _seconds_between_leaders(cluster: Cluster, leader: Operator, standby: Operator) -> float:
    """From the leader's last renewal of the Lease to its successor's first write of it, on the API server's clock."""
    written = [e for e in cluster.audit.since(verb="update", resource="leases", user=USER) if e.code == 200]
    last = [e for e in written if leader.identity in e.user_agent][-1]
    first = next(e for e in written[written.index(last) :] if standby.identity in e.user_agent)
    begin, end = (datetime.fromisoformat(e.raw["requestReceivedTimestamp"]) for e in (last, first))
    return (end - begin).total_seconds()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="crash: the Lease runs out"),
        pytest.param(signal.SIGTERM, id="SIGTERM: the Lease is released"),
        pytest.param(signal.SIGSTOP, id="frozen: it wakes up deposed"),
    ],
)
def test_the_standby_takes_over_and_the_deposed_leader_writes_nothing(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator], how: signal.Signals
) -> None:
    cluster, (leader, standby) = installed_cluster, replicas
    leader.start()
    standby.start(wait=False)
    FineTuneJob("before", namespace).finishes().apply(cluster).wait(cluster, "Complete")
    leader.signal(how)
    standby.wait_until(lambda: standby.metric("finetune_leader") == 1.0)
    if how == signal.SIGTERM:
        eventually(lambda: "no longer leads" in leader.log.read_text(), "it gives the Lease back")
    else:
        assert _seconds_between_leaders(cluster, leader, standby) >= Settings.lease_seconds
    mark = cluster.audit.mark()
    after = FineTuneJob("after", namespace).finishes().holds().apply(cluster)
    after.wait(cluster, "Running")
    if how == signal.SIGSTOP:
        leader.signal(signal.SIGCONT)
        eventually(lambda: not leader.is_running, "a leader that slept through its deadline ends")
    after.end(cluster)
    status = after.wait(cluster, "Complete")
    assert len(status["attempts"]) == 1
    written = [event for event in cluster.audit.since(mark, user=USER, namespace=namespace) if event.is_write]
    by_leader = [event for event in written if leader.identity in event.user_agent]
    assert [event for event in by_leader if event.code < 400] == []
    assert written


async def test_what_a_deposed_leader_still_sends_is_refused(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator]
) -> None:
    """It has seen and decided, then froze; another leads and completes the job; then its writes go out."""
    cluster = installed_cluster
    job = FineTuneJob("fenced", namespace).finishes().apply(cluster)
    settings = Settings(trainer_image="trainer.test/finetune-trainer:1", namespace=NAMESPACE)
    kube = Kube(Credentials(str(cluster.kubeconfig_for(USER))), identity="deposed")
    try:
        state = State(settings, kube, EventRecorder(kube, "deposed"), lambda: "", lambda before, after: None, Cache())
        state.cache.put(await kube.get(FINETUNEJOBS(namespace, job.name)))
        seen = await observe(state, (namespace, job.name), clock.now())
        assert seen is not None
        stale = decide(seen, clock.now(), state.defaults)
        assert stale.create is not None

        replicas[0].start()
        truth = job.wait(cluster, "Complete")
        mark = cluster.audit.mark()
        with pytest.raises(Conflict):
            await act.act(state, seen, stale)
        # The worst: status was written in time, and the process froze between that and its first child.
        stale.status = seen.status
        with pytest.raises(act.Stale):
            await act.act(state, seen, stale)
    finally:
        await kube.close()
    written = [
        event for event in cluster.audit.since(mark, user=USER) if "deposed" in event.user_agent and event.is_write
    ]
    assert [(event.resource, event.subresource, event.code) for event in written] == [("finetunejobs", "status", 409)]
    assert job.status(cluster) == truth


async def test_a_delayed_write_never_lands_on_an_object_made_anew(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator]
) -> None:
    """Server-side apply is an upsert by name: without the version it would mark the new object."""
    cluster = installed_cluster
    job = FineTuneJob("twice", namespace).having(suspend=True).apply(cluster)
    kube = Kube(Credentials(str(cluster.kubeconfig_for(USER))), identity="deposed")
    try:
        old = (await kube.get(FINETUNEJOBS(namespace, job.name)))["metadata"]
        job.delete(cluster)
        job.apply(cluster)
        with pytest.raises(Conflict):
            await kube.apply_status(
                FINETUNEJOBS(namespace, job.name),
                {"phase": "Complete"},
                manager="finetune-operator",
                resource_version=old["resourceVersion"],
            )
    finally:
        await kube.close()
    assert "phase" not in job.status(cluster)


@pytest.mark.timeout(1200)
def test_many_jobs_complete_and_each_child_is_created_once(
    installed_cluster: Cluster, namespace: str, replicas: list[Operator]
) -> None:
    cluster, many = installed_cluster, 500
    replicas[0].start()
    mark = cluster.audit.mark()
    _apply_many(cluster, namespace, range(many))

    def complete() -> bool:
        _start_what_ended(*replicas)  # the standby is among them
        return _complete(cluster, namespace) == many

    eventually(complete, "all complete", seconds=900, every=1)
    for kind, number in {"jobs": many, "configmaps": many, "services": many // 10}.items():
        created = _created(cluster, mark, namespace, kind)
        assert (len(created), set(created.values())) == (number, {1}), kind
