"""Builders of an attempt's children, and of the preflight's before it: ConfigMap, Indexed Job, and a headless Service for pods that must meet. Pure; act.py creates what they return.

Children are never changed after they are made (but for the Job's `suspend`): a changed default touches no running job.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune_crds import names, quantities
from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import OUTCOMES, ExitCode, Policy

from . import volumes
from .identities import child_name, labels, owner_reference, preflight_labels, preflight_name

Json = dict[str, Any]

LOST_NODE_SECONDS = 30
"""How long a pod stays bound to a node that went away."""


class Surroundings(NamedTuple):
    """What a pod needs to know of this installation."""

    trainer_image: str
    """Brings the init of users' own programs."""
    progress_url: str
    """Where this job reports; empty when there is no progress server."""
    progress_host: str
    progress_ca: str


class Children(NamedTuple):
    """In the order in which they are created: the Service before the Job, or the first look-up of a peer would be cached as missing."""

    config_map: Json
    service: Json | None
    """None for a single pod: it has nobody to meet."""
    job: Json


def build(job: ResolvedJob, *, attempt: int, grace_seconds: int, around: Surroundings) -> Children:
    """The children of one attempt.

    Args:
        job: as pinned in status.resolved.
        grace_seconds: time that a stopped pod gets to save.
    """
    name = child_name(job.name, job.uid, attempt)
    meta: Json = {
        "name": name,
        "namespace": job.namespace,
        "labels": labels(job.name, job.uid, attempt),
        "ownerReferences": [owner_reference(job.name, job.uid)],
    }
    return Children(
        config_map=_config_map(meta, job, around),
        service={
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {names.LABEL_UID: job.uid, names.LABEL_ATTEMPT: str(attempt)},
                "ports": [{"name": "rendezvous", "port": names.MASTER_PORT}],
            },
        }
        if job.spec.resources.nodes > 1
        else None,
        job={
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {**meta, "annotations": {names.ANNOTATION_DIGEST: job.digest}},
            "spec": {
                "completionMode": "Indexed",
                "completions": job.spec.resources.nodes,
                "parallelism": job.spec.resources.nodes,
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": list(_failure_rules())},
                "template": {
                    "metadata": {"labels": meta["labels"], "annotations": job.spec.runtime.annotations or {}},
                    "spec": _pod(job, name, attempt, grace_seconds, around),
                },
            },
        },
    )


PREFLIGHT_CPU, PREFLIGHT_MEMORY = "2", "4Gi"
"""What a preflight asks for, if training does not ask for less. It may use as much memory as training: it prepares the same rows."""


def build_preflight(job: ResolvedJob, *, number: int, grace_seconds: int, around: Surroundings) -> Children:
    """The children of a preflight: the training pod once, on its nodes and with its volumes, but without a GPU, a peer, and a token to report with."""
    name = preflight_name(job.name, job.uid, number)
    meta: Json = {
        "name": name,
        "namespace": job.namespace,
        "labels": preflight_labels(job.name, job.uid, number),
        "ownerReferences": [owner_reference(job.name, job.uid)],
    }
    alone = job.model_copy(deep=True)
    resources = alone.spec.resources
    resources.nodes, resources.gpus_per_node = 1, 0
    pod = _pod(alone, name, 0, grace_seconds, around._replace(progress_url=""))
    del pod["subdomain"]
    container = pod["containers"][0]
    container["command"] += ["python", "-m", "finetune_trainer.worker", names.PREFLIGHT]
    # An image may ask for every GPU of its node, and a runtime that sees no request for one would obey.
    unseen = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
    container["env"] = [unseen, *(each for each in container["env"] if each["name"] != unseen["name"])]
    memory = min(PREFLIGHT_MEMORY, str(resources.memory), key=quantities.amount)
    cpu = min(PREFLIGHT_CPU, str(resources.cpu), key=quantities.amount)
    container["resources"] = {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": resources.memory}}
    # Nodes with GPUs are often tainted by the resource's name, and admission lets only pods pass that ask for one.
    pod["tolerations"].append({"key": resources.gpu_resource_name, "operator": "Exists", "effect": "NoSchedule"})
    return Children(
        config_map=_config_map(meta, job, around),
        service=None,
        job={
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {**meta, "annotations": {names.ANNOTATION_DIGEST: job.digest}},
            "spec": {
                "completionMode": "Indexed",
                "completions": 1,
                "parallelism": 1,
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "template": {
                    "metadata": {"labels": meta["labels"], "annotations": job.spec.runtime.annotations or {}},
                    "spec": pod,
                },
            },
        },
    )


def _config_map(meta: Json, job: ResolvedJob, around: Surroundings) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "immutable": True,
        "data": {"job.json": job.model_dump_json(by_alias=True, exclude_none=True), "ca.crt": around.progress_ca},
    }


def _failure_rules() -> Iterator[Json]:
    """From the table of exit codes; what no rule names exhausts the Job's back-off limit of 0 and is counted by the operator.

    The first rule that fits wins: an error of the user stays one though its node is being drained.
    """

    def codes(policy: Policy) -> list[int]:
        return sorted(c for c, outcome in OUTCOMES.items() if outcome.policy == policy and c != ExitCode.FINISHED)

    for action in ("FailJob", "Ignore"):
        values: Json = {"containerName": names.CONTAINER, "operator": "In", "values": codes(action)}
        yield {"action": action, "onExitCodes": values}
    yield {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _pod(job: ResolvedJob, name: str, attempt: int, grace_seconds: int, around: Surroundings) -> Json:
    runtime, resources = job.spec.runtime, job.spec.resources
    everything = list(volumes.mounted(job, name, progress=bool(around.progress_url)))
    volume_list = [each.volume for each in everything]
    container: Json = {
        "name": names.CONTAINER,
        "image": runtime.image,
        "command": ["python", "-m", "finetune_trainer.supervisor"],
        "env": _environment(job, name, attempt, grace_seconds, around),
        "resources": _resources(job),
        "volumeMounts": [mount for each in everything for mount in each.mounts],
        "securityContext": _CONFINED,
        "terminationMessagePath": names.TERMINATION_FILE,
        "terminationMessagePolicy": "File",
    }
    if runtime.image_pull_policy:
        container["imagePullPolicy"] = runtime.image_pull_policy
    pod: Json = {
        "restartPolicy": "Never",
        "subdomain": name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": runtime.run_as_user,
            "runAsGroup": runtime.run_as_user,
            "fsGroup": runtime.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volume_list,
        "tolerations": [
            *(toleration.to_wire() for toleration in resources.tolerations or ()),
            *(
                {
                    "key": f"node.kubernetes.io/{taint}",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": LOST_NODE_SECONDS,
                }
                for taint in ("not-ready", "unreachable")
            ),
        ],
    }
    if runtime.command:
        init = {"name": "init", "mountPath": names.INIT_DIR}
        volume_list.append({"name": "init", "emptyDir": {"sizeLimit": "16Mi"}})
        container["volumeMounts"].append({**init, "readOnly": True})
        container["command"] = [f"{names.INIT_DIR}/finetune-init", "--", *runtime.command]
        container["args"] = runtime.args or []
        pod["initContainers"] = [
            {
                "name": "init",
                "image": around.trainer_image,
                "command": ["finetune-init", "--copy-to", names.INIT_DIR],
                "volumeMounts": [init],
                "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "32Mi"}},
                "securityContext": _CONFINED,
            }
        ]
    optional = {
        "nodeSelector": resources.node_selector,
        "affinity": resources.affinity,
        "runtimeClassName": resources.runtime_class_name,
        "priorityClassName": job.spec.priority_class_name,
        "serviceAccountName": runtime.service_account_name,
        "imagePullSecrets": [{"name": secret.name} for secret in runtime.image_pull_secrets or ()],
    }
    return pod | {field: value for field, value in optional.items() if value}


_CONFINED: Json = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _resources(job: ResolvedJob) -> Json:
    """No limit on CPU: throttling a data loader idles a GPU."""
    wanted = job.spec.resources
    gpus = {wanted.gpu_resource_name: wanted.gpus_per_node} if wanted.gpus_per_node else {}
    return {
        "requests": {"cpu": wanted.cpu, "memory": wanted.memory, **gpus},
        "limits": {"memory": wanted.memory, **gpus},
    }


def _environment(job: ResolvedJob, name: str, attempt: int, grace_seconds: int, around: Surroundings) -> list[Json]:
    resources = job.spec.resources
    users = [variable.to_wire() for variable in job.spec.runtime.env or ()]
    taken = {variable["name"] for variable in users}
    defaults = {
        "HOME": names.SCRATCH_DIR,
        "USER": "finetune",
        "LOGNAME": "finetune",
        "TMPDIR": names.SCRATCH_DIR,
        "XDG_CACHE_HOME": f"{names.SCRATCH_DIR}/cache",
        "HF_HOME": f"{names.SCRATCH_DIR}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{names.SCRATCH_DIR}/inductor",
        "TRITON_CACHE_DIR": f"{names.SCRATCH_DIR}/triton",
        "PYTHONUNBUFFERED": "1",
    }
    contract = {
        names.ENV_JOB_FILE: names.JOB_FILE,
        names.ENV_ATTEMPT: str(attempt),
        names.ENV_NODES: str(resources.nodes),
        names.ENV_PROCESSES_PER_NODE: str(max(resources.gpus_per_node, 1)),
        names.ENV_MASTER_ADDR: f"{name}-0.{name}" if resources.nodes > 1 else "localhost",
        names.ENV_MASTER_PORT: str(names.MASTER_PORT),
        names.ENV_GRACE_SECONDS: str(grace_seconds),
    }
    if around.progress_url:
        contract |= {
            names.ENV_PROGRESS_URL: around.progress_url,
            names.ENV_PROGRESS_CA: names.CA_FILE,
            names.ENV_PROGRESS_TOKEN: names.TOKEN_FILE,
        }
        for variable in ("NO_PROXY", "no_proxy"):  # a corporate proxy does not know the cluster's services
            given = next((v for v in users if v["name"] == variable and "value" in v), None)
            if given:
                given["value"] += f",{around.progress_host}"
            elif variable not in taken:
                contract[variable] = around.progress_host
    from_pod = {
        names.ENV_RUN_ID: "metadata.uid",
        names.ENV_POD_NAME: "metadata.name",
        names.ENV_NODE_RANK: "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    }
    return [
        *({"name": variable, "value": value} for variable, value in defaults.items() if variable not in taken),
        *({"name": variable, "value": value} for variable, value in contract.items()),
        *({"name": v, "valueFrom": {"fieldRef": {"fieldPath": path}}} for v, path in from_pod.items()),
        *users,
    ]
