"""What the operator keeps of each object that it watches: the few fields that it decides by, compared to tell whether anything happened.

handlers.py makes them from watch events, cache.py keeps them, observe.py, progress server and metrics read them.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from finetune_crds import names

Json = dict[str, Any]


@dataclass(slots=True, frozen=True)
class PodView:
    """A pod that trains, or a preflight's."""

    namespace: str
    name: str
    uid: str
    owner: str
    """UID of the FineTuneJob."""
    owner_name: str
    job_name: str
    controller: str
    """UID of the controller reference: the progress server believes no label alone."""
    attempt: int
    index: int
    phase: str
    node: str | None
    created: str
    scheduled: str | None
    """When a node was found for it: from then on it holds its GPUs."""
    running_since: str | None
    """When the training container started, also when it has ended since."""
    deleted: str | None
    """When it was asked to stop, or when it vanished."""
    unschedulable: str | None
    """The scheduler's words."""
    disrupted: str | None
    """Reason of the condition DisruptionTarget."""
    evicted: str | None
    """The kubelet's words, when it ended the pod for taking more than its own limits: DisruptionTarget stands where the node was short."""
    waiting: str | None
    """Reason why a container does not start."""
    waiting_message: str
    exit_code: int | None
    exit_reason: str
    message: str
    """Termination message."""
    finished: str | None
    """When the training container ended."""
    image: str
    """What its container runs, by digest; empty while the kubelet has not said so."""
    is_preflight: bool = False
    """It checks, and does not train."""
    gone: bool = False
    """The object is deleted; kept until its Job goes, for what it told."""

    @property
    def ended(self) -> bool:
        """It holds nothing any more."""
        return self.gone or self.phase in ("Succeeded", "Failed")

    @property
    def is_quiet(self) -> bool:
        """Nothing follows from it: it is on its way and nothing holds it back so far, or it ended well, as its Job will tell."""
        if self.gone or self.deleted:
            return False
        return self.exit_code == 0 or (self.phase == "Pending" and not self.unschedulable and not self.waiting)

    @property
    def running(self) -> bool:
        """Its training container runs."""
        return not self.ended and self.running_since is not None and self.finished is None


@dataclass(slots=True, frozen=True)
class JobView:
    """A batch/v1 Job."""

    namespace: str
    name: str
    uid: str
    owner: str
    """UID of the FineTuneJob by label; `controller` is the one that counts."""
    owner_name: str
    controller: str
    """UID of the controller reference."""
    attempt: int
    created: str
    suspended: bool
    started: str | None
    """Start of the present active time: the Job controller sets it anew on resume, and until it has, there is none."""
    active: int
    terminating: int
    complete: str | None
    """When it became Complete."""
    failed: str | None
    """When it became Failed."""
    failure: str
    """Reason and message of the condition Failed."""
    deleting: bool
    is_preflight: bool = False
    """It checks, and does not train."""

    @property
    def ended(self) -> bool:
        """Complete or Failed."""
        return bool(self.complete or self.failed)


def pod_view(pod: Json, *, gone: bool = False) -> PodView:
    """Takes from a core/v1 Pod what matters."""
    meta, status, spec = pod["metadata"], pod.get("status", {}), pod.get("spec", {})
    labels = meta.get("labels", {})
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    scheduled = conditions.get("PodScheduled", {})
    disruption = conditions.get("DisruptionTarget", {})
    disrupted = disruption.get("reason") if disruption.get("status") == "True" else None
    containers: list[Json] = status.get("containerStatuses", [])
    trainer: Json = next((each for each in containers if each["name"] == names.CONTAINER), {})
    state: Json = trainer.get("state", {})
    waiting: Json = next(
        (
            each["state"]["waiting"]
            for each in (*status.get("initContainerStatuses", ()), *containers)
            if "waiting" in each.get("state", {})
        ),
        {},
    )
    ended, running = state.get("terminated", {}), state.get("running", {})
    return PodView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        owner=labels.get(names.LABEL_UID, ""),
        owner_name=labels.get(names.LABEL_JOB, ""),
        job_name=labels.get("batch.kubernetes.io/job-name", ""),
        controller=controller_uid(pod),
        attempt=_number(labels.get(names.LABEL_ATTEMPT)),
        index=_number(labels.get("batch.kubernetes.io/job-completion-index")),
        phase=status.get("phase", "Pending"),
        node=spec.get("nodeName"),
        created=meta["creationTimestamp"],
        scheduled=scheduled.get("lastTransitionTime") if scheduled.get("status") == "True" else None,
        running_since=running.get("startedAt") or ended.get("startedAt"),
        deleted=meta.get("deletionTimestamp"),
        unschedulable=scheduled.get("message") if scheduled.get("status") == "False" else None,
        disrupted=disrupted,
        evicted=status.get("message", "") if status.get("reason") == "Evicted" and not disrupted else None,
        waiting=waiting.get("reason"),
        waiting_message=waiting.get("message", ""),
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason", ""),
        message=ended.get("message", ""),
        finished=ended.get("finishedAt"),
        image=trainer.get("imageID", ""),
        is_preflight=names.LABEL_PREFLIGHT in labels,
        gone=gone,
    )


def job_view(job: Json) -> JobView:
    """Takes from a batch/v1 Job what matters."""
    meta, spec, status = job["metadata"], job.get("spec", {}), job.get("status", {})
    labels = meta.get("labels", {})
    holds = {c["type"]: c for c in status.get("conditions", ()) if c["status"] == "True"}
    failed = holds.get("Failed", {})
    return JobView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        owner=labels.get(names.LABEL_UID, ""),
        owner_name=labels.get(names.LABEL_JOB, ""),
        controller=controller_uid(job),
        attempt=_number(labels.get(names.LABEL_ATTEMPT)),
        created=meta["creationTimestamp"],
        suspended=bool(spec.get("suspend")),
        started=None if "Suspended" in holds else status.get("startTime"),
        active=status.get("active", 0),
        terminating=status.get("terminating", 0),
        complete=holds.get("Complete", {}).get("lastTransitionTime"),
        failed=failed.get("lastTransitionTime"),
        failure=f"{failed.get('reason', '')}: {failed.get('message', '')}" if failed else "",
        deleting="deletionTimestamp" in meta,
        is_preflight=names.LABEL_PREFLIGHT in labels,
    )


def controller_uid(child: Json) -> str:
    """UID of a child's controller; empty when nobody controls it."""
    references = child["metadata"].get("ownerReferences", ())
    return next((str(each["uid"]) for each in references if each.get("controller")), "")


@dataclass(slots=True)
class FineTuneJobView:
    """A FineTuneJob. Of a finished one only what metrics, cleaning and a late reporter need."""

    namespace: str
    name: str
    uid: str
    version: int
    generation: int
    created: str
    finished: bool
    """Complete or Failed, and status is about this generation's end."""
    deleting: bool
    phase: str
    method: str
    """full, lora or program."""
    gpus: int
    attempt: int
    """Number of the current attempt; 0 before the first."""
    job_name: str
    """Name of the current attempt's Job."""
    run_id: str
    """UID of the first pod of the current run, as far as status knows."""
    stop: str
    """Why its trainer is to stop: Suspended or DeadlineExceeded; empty to go on."""
    raw: bytes | None
    """The object without managedFields; None once a finished job is settled."""

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.namespace, self.name

    def document(self) -> Json | None:
        """The whole object (without managedFields); None when only the view is left of it: read it live then."""
        return orjson.loads(self.raw) if self.raw is not None else None


def finetunejob_view(body: Json) -> FineTuneJobView:
    """Takes from a FineTuneJob what matters. Removes its managedFields."""
    meta, spec, status = body["metadata"], body.get("spec", {}), body.get("status", {})
    meta.pop("managedFields", None)
    holds = {c["type"] for c in status.get("conditions", ()) if c["status"] == "True"}
    attempts = status.get("attempts") or [{}]
    is_program = bool(spec.get("runtime", {}).get("command"))
    return FineTuneJobView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=int(meta["resourceVersion"]),
        generation=meta["generation"],
        created=meta["creationTimestamp"],
        finished=bool(holds & {names.ConditionType.COMPLETE, names.ConditionType.FAILED}),
        deleting="deletionTimestamp" in meta,
        phase=status.get("phase", "Pending"),
        method="program" if is_program else next(iter(spec.get("method", ())), "lora"),
        gpus=status.get("gpus", 0),
        attempt=attempts[-1].get("number", 0),
        job_name=attempts[-1].get("jobName", ""),
        run_id=attempts[-1].get("runId", ""),
        stop="Suspended" if spec.get("suspend") else "DeadlineExceeded" if _past_deadline(status) else "",
        raw=orjson.dumps(body),
    )


def _past_deadline(status: Json) -> bool:
    return any(c["reason"] == "DeadlineExceeded" for c in status.get("conditions", ()) if c["type"] == "Suspended")


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
