"""Who may report and what may be sent: a real operator's progress server, real tokens, real reviews."""

import gzip
import json
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cluster import Cluster
from finetune_crds import names
from finetune_crds.progress import BODY_MAX

from .jobs import FineTuneJob, Json, condition, eventually, listed
from .operators import USER, Operator
from .reporting import Reporter, at, checkpoint, forged, ours, pod_token, progress_writes, reporter, stock


@pytest.fixture
def pod(installed_cluster: Cluster, namespace: str, operator: Operator) -> Reporter:
    """A running pod of a job."""
    return reporter(installed_cluster, FineTuneJob("support-bot", namespace).holds().apply(installed_cluster))


def posts(operator: Operator, code: int) -> float:
    """How often the server has answered with a code."""
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.metrics_port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    wanted = f'finetune_progress_posts_total{{code="{code}"}} '
    return next((float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted)), 0.0)


def test_own_pod_is_answered_and_its_report_is_in_status_at_once(
    installed_cluster: Cluster, namespace: str, pod: Reporter
) -> None:
    answer = pod.post(ours(120, tokensPerSecond=5000, checkpoints={"latest": checkpoint(100)}))
    assert (answer.code, answer.body) == (200, {"action": "continue"})
    job = FineTuneJob("support-bot", namespace)
    status = job.until(installed_cluster, lambda s: s.get("progress"))
    assert status["progress"]["display"] == "40 % (120/300)"
    assert status["progress"]["pod"] == pod.pod
    assert status["checkpoints"]["latest"] == checkpoint(100)
    assert status["conditions"], "what the other manager owns stays"
    columns = installed_cluster.kubectl("get", "ftj", "support-bot", "-n", namespace).splitlines()[1].split()
    assert columns[:6] == ["support-bot", "Running", "40", "%", "(120/300)", "0.8264"]


def test_tokens_that_are_not_this_pods_are_refused(
    installed_cluster: Cluster, namespace: str, pod: Reporter, operator: Operator
) -> None:
    cluster = installed_cluster
    other = reporter(cluster, FineTuneJob("other", namespace).holds().apply(cluster))
    before = {code: posts(operator, code) for code in (401, 403, 404, 405)}
    table = {
        "no token": (pod.with_token(""), 401, "Authorization: Bearer"),
        "a word": (pod.with_token("letmein"), 401, "not valid here"),
        "forged": (pod.with_token(forged(namespace, pod.pod, pod.pod_uid)), 401, "not valid here"),
        "for the API server": (
            pod.with_token(pod_token(cluster, namespace, pod.pod, "https://kubernetes.default.svc.cluster.local")),
            401,
            "not valid here",
        ),
        "bound to no pod": (pod.with_token(pod_token(cluster, namespace, "")), 401, "not valid here"),
        "another job's pod": (other.report_as(pod), 403, "does not belong to FineTuneJob support-bot"),
        "a stranger with the job's labels": (_stranger(cluster, namespace, pod), 403, "not controlled by the Job"),
    }
    for what, (client, code, sentence) in table.items():
        answer = client.post()
        assert (answer.code, sentence in answer.body["error"]) == (code, True), f"{what}: {answer}"
    assert pod.post(method="GET").code == 405
    assert pod.post(path="/metrics").code == 404
    counted = {code: posts(operator, code) - before[code] for code in before}
    assert counted == {401: 5, 403: 2, 404: 1, 405: 1}
    assert "progress" not in FineTuneJob("support-bot", namespace).status(cluster)


def test_a_preflights_pod_may_not_report(installed_cluster: Cluster, namespace: str, pod: Reporter) -> None:
    """It has no token; one that somebody made for it is refused by the label of its pod."""
    cluster = installed_cluster
    job = FineTuneJob("silent", namespace).checked(preflight_hold="true").apply(cluster)
    (check,) = eventually(lambda: listed(cluster, "pods", namespace, "finetune.dev/preflight"), "its pod")
    assert "serviceAccountToken" not in json.dumps(check["spec"])
    assert names.ENV_PROGRESS_URL not in {each["name"] for each in check["spec"]["containers"][0]["env"]}
    url = pod.url.replace("support-bot", job.name)
    answer = replace(pod, url=url, token=pod_token(cluster, namespace, check["metadata"]["name"])).post()
    assert (answer.code, "is a preflight" in answer.body["error"]) == (403, True), answer


def test_a_pod_of_another_namespace_is_refused(installed_cluster: Cluster, pod: Reporter) -> None:
    cluster = installed_cluster
    elsewhere = f"{pod.namespace}-b"
    cluster.api.create("namespaces", {"metadata": {"name": elsewhere}})
    try:
        stranger = reporter(cluster, FineTuneJob("support-bot", elsewhere).holds().apply(cluster))
        answer = stranger.report_as(pod).post()
        assert (answer.code, answer.body["error"]) == (
            403,
            f"the token is of a pod in namespace {elsewhere}, not {pod.namespace}",
        )
    finally:
        cluster.api.delete("namespaces", elsewhere)


def test_bodies_that_break_the_contract_are_refused(pod: Reporter, operator: Operator) -> None:
    before = {code: posts(operator, code) for code in (400, 413, 415)}
    large = b'{"trainerStatus": {}, "padding": "' + b"x" * BODY_MAX + b'"}'
    assert pod.post(content=large).code == 413, "told by its length"
    assert pod.post(content=(large[i : i + 8192] for i in range(0, len(large), 8192))).code == 413, "in chunks"
    packed = gzip.compress(b" " * 10_000_000)
    assert pod.post(content=packed, headers={"Content-Encoding": "gzip"}).code == 415
    for body, field in (
        ({}, "trainerStatus"),
        (stock(101), "trainerStatus.progressPercentage"),
        (ours(-1), "finetune.step"),
        (ours(1, attempt=2), "finetune.attempt"),
    ):
        answer = pod.post(body)
        assert (answer.code, field in answer.body["error"]) == (400, True), answer
    assert pod.post(content=b"{").code == 400
    assert {code: posts(operator, code) - before[code] for code in before} == {400: 5, 413: 2, 415: 1}
    assert pod.post().code == 200, "after all this the pod is still welcome"


def test_a_job_that_reports_too_often_is_slowed_and_others_are_not(
    installed_cluster: Cluster, namespace: str, pod: Reporter, operator: Operator
) -> None:
    other = reporter(installed_cluster, FineTuneJob("other", namespace).holds().apply(installed_cluster))
    before, mark = posts(operator, 429), installed_cluster.audit.mark()
    began = time.monotonic()
    answers = [pod.post(ours(step)) for step in range(60)]
    seconds = time.monotonic() - began
    slowed = [answer for answer in answers if answer.code == 429]
    assert {answer.code for answer in answers} == {200, 429}
    assert 20 <= len(answers) - len(slowed) <= 21 + seconds, "twenty at once, then one a second"
    assert all(answer.retry_after == 1 for answer in slowed)
    assert posts(operator, 429) - before == len(slowed)
    assert other.post().code == 200
    audit = installed_cluster.audit
    assert len(audit.since(mark, resource="tokenreviews", user=USER)) == 2, (
        "one for each token, then a minute of memory"
    )
    written = progress_writes(installed_cluster, mark, FineTuneJob("support-bot", namespace))
    assert 1 <= len(written) <= 1 + seconds // 30, "sixty reports within 30 s are one write"


def test_a_flood_of_forged_tokens_costs_few_reviews_and_shuts_out_nobody(
    installed_cluster: Cluster, pod: Reporter, log_folder: Path
) -> None:
    """At a replica of its own, where no other test has used up this address's allowance."""
    flooded = Operator(installed_cluster, log_folder / "log", "flooded", progress_host="127.0.0.1").start(wait=False)
    try:
        flooded.wait_until(flooded.stands_by)
        _flood(installed_cluster, flooded, at(pod, flooded.progress_port))
    finally:
        flooded.stop()


def _flood(cluster: Cluster, operator: Operator, pod: Reporter) -> None:
    assert pod.post().code == 200
    before, mark = posts(operator, 429), cluster.audit.mark()
    tokens = [forged(pod.namespace, pod.pod, pod.pod_uid, serial) for serial in range(150)]
    began = time.monotonic()
    codes = [pod.with_token(token).post().code for token in tokens]
    seconds = time.monotonic() - began
    assert set(codes) == {401, 429}
    assert 30 <= codes.count(401) <= 31 + seconds, "thirty at once, then one a second"
    assert posts(operator, 429) - before == codes.count(429)
    reviews = cluster.audit.since(mark, resource="tokenreviews", user=USER)
    assert len(reviews) == codes.count(401)
    assert pod.post().code == 200, "a pod that is known is not taken for the flood from its own address"


def test_pods_whose_time_is_over_are_told_to_stop(
    installed_cluster: Cluster, namespace: str, operator: Operator
) -> None:
    cluster = installed_cluster
    job = FineTuneJob("retried", namespace).exits(70).holds().having(retries=1).apply(cluster)
    first = reporter(cluster, job)
    assert first.post(ours(5)).code == 200
    job.end(cluster)
    job.until(cluster, lambda s: len(s.get("attempts", ())) == 2)
    answer = first.post(ours(6))
    assert answer.code == 409, answer
    second = reporter(cluster, job)
    job.end(cluster)
    job.wait(cluster, "Failed")
    answer = second.post(ours(7, attempt=2))
    assert answer.code == 409, answer
    assert job.status(cluster)["progress"]["step"] == 5


def test_a_job_made_again_under_its_name_takes_no_report_of_its_predecessor(
    installed_cluster: Cluster, namespace: str, pod: Reporter
) -> None:
    cluster = installed_cluster
    assert pod.post().code == 200
    FineTuneJob("support-bot", namespace).delete(cluster, "Orphan")
    eventually(lambda: not listed(cluster, "finetunejobs", namespace), "the first one is gone")
    FineTuneJob("support-bot", namespace).holds().apply(cluster)
    eventually(
        lambda: "made again" in pod.post().body.get("error", ""), "the old pod is told that it was replaced", every=1
    )
    assert pod.post().code == 409
    assert "progress" not in FineTuneJob("support-bot", namespace).status(cluster)


def test_suspension_reaches_the_trainer_with_its_next_report(
    installed_cluster: Cluster, namespace: str, operator: Operator
) -> None:
    cluster = installed_cluster
    job = FineTuneJob("paused", namespace).holds().kwok(stop_for="20s").apply(cluster)
    pod = reporter(cluster, job)
    assert pod.post(ours(1)).body == {"action": "continue"}
    job.edit(cluster, suspend=True)
    job.until(cluster, lambda s: condition(s, "Suspended"))
    assert pod.post(ours(2)).body == {"action": "stop", "reason": "Suspended"}
    answer = pod.post(ours(3, stage="Saving", checkpoints={"latest": checkpoint(3)}))
    assert answer.code == 200, "what it saves on the way out still counts"
    job.until(cluster, lambda s: s.get("checkpoints", {}).get("latest", {}).get("step") == 3)


def _stranger(cluster: Cluster, namespace: str, pod: Reporter) -> Reporter:
    """A pod that a user made by hand, with every label of the job's own pod and an owner that it does not have."""
    copy = cluster.api.get("pods", pod.pod, namespace)
    metadata: Json = {"name": "stranger", "namespace": namespace, "labels": copy["metadata"]["labels"]}
    # Not its batch labels: the Job controller would adopt it or count it.
    metadata["labels"] = {k: v for k, v in metadata["labels"].items() if k.startswith("finetune.dev/")}
    restricted = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "trainer", "image": "none", "securityContext": confined}
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"securityContext": restricted, "containers": [container]},
    }
    cluster.api.create("pods", manifest, namespace)
    return pod.with_token(pod_token(cluster, namespace, "stranger"))
