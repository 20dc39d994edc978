"""What there is, for one FineTuneJob: mostly from the cache, live where the cache cannot know or must not be trusted.

Live reads: a finished job whose body was let go, a Job that seems deleted, nodes of pods that do not end, events of pods that do
not start, claims of a job that has not begun: whether several nodes may mount them, and whether a preflight's pod would place them.
"""

import asyncio
from contextlib import suppress
from datetime import datetime

from finetune_crds.names import ConditionType
from finetune_crds.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus

from . import attempts, preflight, volumes
from .clock import seconds_between
from .conditions import holds
from .kube import CLAIMS, CORE_EVENTS, FINETUNEJOBS, JOBS, NODES, NotFound
from .seen import Json, Seen, Unshared
from .state import Key, State
from .turn import SETTLE
from .upstream import Upstream, readings
from .views import JobView, PodView
from .waiting import STARTING, Note

_NOTES = 10


async def observe(state: State, key: Key, now: datetime) -> Seen | None:
    """Everything that a pass decides by; None when the FineTuneJob does not exist."""
    body = await _body(state, key)
    if body is None:
        return None
    meta, spec = body["metadata"], body["spec"]
    status = FineTuneJobStatus.model_validate(body.get("status", {}))
    jobs = await _jobs(state, key, meta["uid"], status)
    pods = [pod for pod in state.cache.pods_of(meta["uid"]) if pod.namespace == key[0]]
    doing = attempts.current(status) or preflight.current(status)
    open_job = jobs.get(doing.job_name) if doing else None
    return Seen(
        namespace=key[0],
        name=key[1],
        uid=meta["uid"],
        version=meta["resourceVersion"],
        generation=meta["generation"],
        created=meta["creationTimestamp"],
        deleting="deletionTimestamp" in meta,
        annotations=meta.get("annotations", {}),
        spec=spec,
        status=status,
        jobs=jobs,
        pods=pods,
        lost=await _lost(state, pods),
        notes=await _notes(state, open_job, pods, now) if open_job else [],
        unshared=await _unshared(state, key[0], spec, status),
        unbound=await _unbound(state, key[0], spec, status),
        refused=state.refusals.get(meta["uid"]),
        upstreams=await _upstreams(state, key, spec, status),
    )


async def _upstreams(state: State, key: Key, spec: Json, status: FineTuneJobStatus) -> dict[str, Upstream]:
    """Jobs whose output this one reads. An attempt holds what they had published when it was recorded."""
    if attempts.current(status) or holds(status, ConditionType.COMPLETE):
        return {}
    found = {}
    for name in {reading.job for reading in readings(spec)}:
        if body := await _body(state, (key[0], name)):
            found[name] = Upstream(body["spec"], FineTuneJobStatus.model_validate(body.get("status", {})))
        if name not in found or not holds(found[name].status, ConditionType.COMPLETE):
            state.readers.setdefault((key[0], name), set()).add(key)
    return found


async def _body(state: State, key: Key) -> Json | None:
    view = state.cache.job(*key)
    document = view.document() if view else None
    if view is None or document is not None:
        return document
    try:
        return await state.kube.get(FINETUNEJOBS(*key))
    except NotFound:
        return None


async def _jobs(state: State, key: Key, uid: str, status: FineTuneJobStatus) -> dict[str, JobView]:
    """Jobs that this very object controls; a label alone proves nothing."""
    doing = attempts.current(status) or preflight.current(status)
    if doing and doing.start_time and doing.job_name not in state.cache.children_of(uid):
        with suppress(NotFound):  # it ran: before another Job is made let nobody but the API server say that it is gone
            state.cache.put_child(await state.kube.get(JOBS(key[0], doing.job_name)))
    children = state.cache.children_of(uid)
    return {name: job for name, job in children.items() if job.controller == uid and job.namespace == key[0]}


async def _lost(state: State, pods: list[PodView]) -> frozenset[str]:
    """Pods that are to end on nodes that cannot end them: they stay Terminating until somebody repairs the node."""
    ending = [pod for pod in pods if pod.deleted and pod.node and not pod.ended]
    if not ending:
        return frozenset()
    nodes = sorted({pod.node for pod in ending if pod.node})
    away = dict(zip(nodes, await asyncio.gather(*(_is_away(state, node) for node in nodes)), strict=True))
    return frozenset(pod.uid for pod in ending if pod.node and away[pod.node])


async def _is_away(state: State, node: str) -> bool:
    try:
        found = await state.kube.get(NODES(None, node))
    except NotFound:
        return True
    conditions = found.get("status", {}).get("conditions", ())
    return not any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


async def _notes(state: State, job: JobView, pods: list[PodView], now: datetime) -> list[Note]:
    """Warnings about what does not start and does not say why itself."""
    if job.ended or job.suspended or seconds_between(job.started or job.created, now) < SETTLE:
        return []
    alive = [pod for pod in pods if pod.job_name == job.name and not pod.ended]
    stuck = [pod for pod in alive if not pod.running and not pod.unschedulable and pod.waiting in (None, *STARTING)]
    if alive and not stuck:
        return []
    uid = stuck[0].uid if stuck else job.uid
    found = [each async for each in state.kube.list(CORE_EVENTS(job.namespace), fields=f"involvedObject.uid={uid}")]
    found = [each for each in found if each.get("type") == "Warning"]
    found.sort(key=lambda each: each.get("lastTimestamp") or each.get("eventTime") or "", reverse=True)
    return [Note(each.get("reason", ""), each.get("message", "")) for each in found[:_NOTES]]


def _claims(spec: Json) -> dict[str, bool]:
    """Claims of its pods, and whether anything may be written there; none of a spec that specs.py will refuse."""
    with suppress(ValueError):
        return volumes.mounted_claims(FineTuneJobSpec.model_validate(spec))
    return {}


async def _unshared(state: State, namespace: str, spec: Json, status: FineTuneJobStatus) -> Unshared | None:
    """A claim that cannot be mounted where several nodes would have to, before they try."""
    if spec.get("resources", {}).get("nodes", 1) == 1 or holds(status, ConditionType.SPEC_FROZEN):
        return None
    for claim, written in _claims(spec).items():
        try:
            found = await state.kube.get(CLAIMS(namespace, claim))
        except NotFound:  # its pods will wait for it
            continue
        modes: list[str] = found.get("status", {}).get("accessModes") or found["spec"]["accessModes"]
        if not {"ReadWriteMany"} & set(modes) and (written or "ReadOnlyMany" not in modes):
            return Unshared(claim, modes)
    return None


async def _unbound(state: State, namespace: str, spec: Json, status: FineTuneJobStatus) -> str:
    """A claim that waits for its first pod, where a preflight that nobody asked for by name might be that pod."""
    is_program = bool(spec.get("runtime", {}).get("command"))
    doing = attempts.current(status) or preflight.current(status)
    if is_program or spec.get("preflight") or doing or holds(status, ConditionType.SPEC_FROZEN):
        return ""
    for claim in _claims(spec):
        with suppress(NotFound):  # its pods will wait for it
            found = await state.kube.get(CLAIMS(namespace, claim))
            if found.get("status", {}).get("phase") != "Bound":
                return claim
    return ""
