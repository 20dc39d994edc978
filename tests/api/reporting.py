"""Training pods' side of the progress server: a simulated pod's own URL, CA and token, and POSTs as any client sends them."""

import asyncio
import base64
import http.client
import json
import ssl
import time
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.cluster import Cluster
from finetune_crds import names
from finetune_operator.progress_server import reports
from finetune_operator.progress_server.runs import Run
from finetune_operator.progress_server.statuses import Reported

from .jobs import FineTuneJob, Json, eventually, listed


class Answer(NamedTuple):
    """What the server said."""

    code: int
    body: Json
    retry_after: int | None


@dataclass(frozen=True)
class Reporter:
    """One pod of a job, with what its container was given."""

    pod: str
    pod_uid: str
    namespace: str
    url: str
    ca: str
    token: str

    def post(
        self,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        method: str = "POST",
        path: str | None = None,
        content: bytes | Iterable[bytes] | None = None,
    ) -> Answer:
        """One request on a connection of its own. `content`: the body as it is; an iterable is sent in chunks."""
        address = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPSConnection(
            address.netloc, context=ssl.create_default_context(cadata=self.ca), timeout=20
        )
        data = json.dumps(stock(1) if body is None else body).encode() if content is None else content
        sent = {"Content-Type": "application/json"} | (headers or {})
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        chunked = not isinstance(data, bytes)
        if chunked:
            sent["Transfer-Encoding"] = "chunked"
        try:
            connection.request(method, path or address.path, body=data, headers=sent, encode_chunked=chunked)
            answer = connection.getresponse()
            after = answer.headers["Retry-After"]
            return Answer(answer.status, json.loads(answer.read() or b"{}"), int(after) if after else None)
        finally:
            connection.close()

    def with_token(self, token: str) -> "Reporter":
        return replace(self, token=token)

    def report_as(self, other: "Reporter") -> "Reporter":
        """This pod's token on the path of another job."""
        return replace(self, url=other.url)


def reporter(cluster: Cluster, job: FineTuneJob, index: int = 0) -> Reporter:
    """A running pod of a job, with what the operator put into its container. The operator has said that it runs: its status is not written beside reports."""
    job.wait(cluster, "Running")
    selector = (
        f"{names.LABEL_JOB}={job.name},batch.kubernetes.io/job-completion-index={index}",
        "status.phase=Running",
    )
    pods = eventually(lambda: listed(cluster, "pods", job.namespace, *selector), f"a running pod of {job.name}")
    pod, namespace = pods[0], job.namespace
    name = pod["metadata"]["name"]
    container = next(c for c in pod["spec"]["containers"] if c["name"] == names.CONTAINER)
    environment = {each["name"]: each.get("value", "") for each in container["env"]}
    attempt = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    (config_map,) = (c for c in listed(cluster, "configmaps", namespace) if c["metadata"]["name"] == attempt)
    return Reporter(
        pod=name,
        pod_uid=pod["metadata"]["uid"],
        namespace=namespace,
        url=environment[names.ENV_PROGRESS_URL],
        ca=config_map["data"][names.CA_FILE.rpartition("/")[2]],
        token=pod_token(cluster, namespace, name),
    )


def progress_writes(cluster: Cluster, mark: int, job: FineTuneJob) -> list[Json]:
    """status of each successful apply by the progress manager since `mark`."""
    patches = {"resource": "finetunejobs", "subresource": "status", "verb": "patch", "code": 200}
    events = cluster.audit.since(mark, namespace=job.namespace, name=job.name, **patches)
    return [e.request["status"] for e in events if f"fieldManager={names.MANAGER_PROGRESS}" in e.raw["requestURI"]]


def at(client: Reporter, port: int) -> Reporter:
    """The same pod at another replica, as the Service would have it."""
    head, _, path = client.url.removeprefix("https://").partition("/")
    return replace(client, url=f"https://{head.partition(':')[0]}:{port}/{path}")


def pod_token(cluster: Cluster, namespace: str, pod: str, audience: str = names.AUDIENCE) -> str:
    """What the kubelet projects into the pod, from the same TokenRequest."""
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}") if pod else ()
    return cluster.kubectl(
        "create", "token", "default", f"--namespace={namespace}", f"--audience={audience}", *bound
    ).strip()


def forged(namespace: str, pod: str, pod_uid: str, serial: int = 0) -> str:
    """A token that says all the right things, signed by somebody else."""
    part = {"pod": {"name": pod, "uid": pod_uid}, "namespace": namespace, "serviceaccount": {"name": "default"}}
    claims = {
        "iss": "https://kubernetes.default.svc.cluster.local",
        "sub": f"system:serviceaccount:{namespace}:default",
        "aud": [names.AUDIENCE],
        "exp": int(time.time()) + 3600,
        "jti": str(serial),
        "kubernetes.io": part,
    }
    signed = f"{_encode({'alg': 'ES256', 'kid': 'x'})}.{_encode(claims)}"
    signature = ec.generate_private_key(ec.SECP256R1()).sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def _encode(claims: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")


def stock(percent: int, **metrics: object) -> Json:
    """A report as transformers' KubeflowCallback sends it."""
    named = [{"name": name, "value": str(value)} for name, value in metrics.items()]
    return {
        "trainerStatus": {
            "lastUpdatedTime": "2026-01-31T12:00:00+00:00",
            "progressPercentage": percent,
            "metrics": named,
        }
    }


def ours(step: int, total: int = 300, *, attempt: int = 1, stage: str = "Training", **more: Any) -> Json:
    """A report as our trainer sends it."""
    part = {"attempt": attempt, "stage": stage, "step": step, "totalSteps": total, **more}
    return {"trainerStatus": {"metrics": [{"name": "loss", "value": f"{100 / (abs(step) + 1):.4f}"}]}, "finetune": part}


def checkpoint(step: int) -> Json:
    """A committed checkpoint."""
    return {
        "step": step,
        "uri": f"s3://bucket/out.checkpoints/step-{step:08d}",
        "digest": "sha256:" + f"{step:064x}",
        "time": "2026-01-31T12:00:00Z",
    }


async def run_of(cluster: Cluster, job: FineTuneJob) -> Run:
    """The run of a job's running pod, as the server admits it."""
    await asyncio.to_thread(job.wait, cluster, "Running")
    body = job.read(cluster)
    (pod,) = listed(cluster, "pods", job.namespace, labels=f"finetune.dev/uid={body['metadata']['uid']}")
    created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    return Run(
        namespace=job.namespace,
        name=job.name,
        uid=body["metadata"]["uid"],
        attempt=1,
        pod=pod["metadata"]["name"],
        pod_created=created,
        pod_started=created,
        stop="",
    )


def reported(run: Run, body: Json) -> Reported:
    """A report of a run as the server takes it over."""
    return Reported(run, reports.parse(json.dumps(body).encode()), datetime.now(UTC))
