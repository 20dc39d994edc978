"""Carries out a decision: status first, fenced by the version that was seen; then children. The only caller of writes for jobs."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from finetune_crds.names import MANAGER_OPERATOR
from finetune_crds.v1alpha1 import Attempt, FineTuneJobStatus, Progress

from . import children
from .attempts import current
from .decisions import Decision, Plan
from .kube import (
    CONFIGMAPS,
    FINETUNEJOBS,
    JOBS,
    SERVICES,
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Ref,
    Unreachable,
)
from .seen import Json, Refusal, Seen
from .state import State
from .views import JobView, PodView, controller_uid

_OF_PROGRESS = ("progress", "metrics", "checkpoints", "inputs", "evaluation")


class NameTaken(Exception):
    """An object that is not ours has the name of a child."""


class Stale(Exception):
    """What was seen is no longer so: look again before children are made."""


async def act(state: State, seen: Seen, decision: Decision) -> None:
    """Writes what was decided.

    Raises:
        Conflict, Stale: the object has changed since it was seen.
        ApiError, Unreachable: tried again from the start; every step may be repeated.
    """
    written = await _write_status(state, seen, decision.status)
    try:
        await _carry_out(state, seen, decision, written=written)
    except (ApiError, Unreachable):
        if written:  # what status says now is told, since the next pass finds it said already
            await state.events.publish(seen, decision.events)
        raise
    await state.events.publish(seen, decision.events)


async def _carry_out(state: State, seen: Seen, decision: Decision, *, written: bool) -> None:
    if decision.suspend:
        await _suspend(state, *decision.suspend)
    await asyncio.gather(*(_delete(state, job) for job in decision.delete))
    if decision.create:
        if not written:
            await _confirm(state, seen)
        await _create(state, seen, decision.create)


async def _write_status(state: State, seen: Seen, status: FineTuneJobStatus) -> bool:
    if status == seen.status:
        return False
    try:
        applied = await state.kube.apply_status(
            FINETUNEJOBS(seen.namespace, seen.name),
            owned(status, seen.pods),
            manager=MANAGER_OPERATOR,
            resource_version=seen.version,
        )
    except NotFound:
        raise Stale(f"{seen.namespace}/{seen.name} was deleted") from None
    state.cache.put(applied)
    state.ended(seen.status, status)
    return True


def owned(status: FineTuneJobStatus, pods: Iterable[PodView]) -> Json:
    """The part of status that the operator applies.

    Once the current run has reported, what it reports belongs to the progress server, whose applies carry all that was known
    before. Until then, and after the end, the operator's apply keeps it: what its owner leaves out is deleted.
    """
    wire = status.to_wire()
    attempt, progress = current(status), status.progress
    run = next((pod.name for pod in pods if attempt and pod.uid == attempt.run_id), None)
    if attempt and progress and (progress.pod == run is not None or _is_of_another_spec(status, attempt, progress)):
        for field in _OF_PROGRESS:
            wire.pop(field, None)
    return wire


def _is_of_another_spec(status: FineTuneJobStatus, attempt: Attempt, progress: Progress) -> bool:
    """After an edit, checkpoints and metrics of what was trained before are no longer this job's."""
    reported = next((each for each in status.attempts or () if each.number == progress.attempt), attempt)
    return reported.spec_digest != attempt.spec_digest


async def _suspend(state: State, job: JobView, value: bool) -> None:
    body = {"metadata": {"uid": job.uid}, "spec": {"suspend": value}}
    state.cache.put_child(await state.kube.patch(JOBS(job.namespace, job.name), body))


async def _delete(state: State, job: JobView) -> None:
    """The Job last: as long as it is there, the others are tried again."""
    if not job.ended:  # stop its pods first; they may save for as long as their grace period
        await state.kube.delete(JOBS(job.namespace, job.name), uid=job.uid)
    for kind in (SERVICES, CONFIGMAPS):
        ref = kind(job.namespace, job.name)
        with suppress(NotFound):
            found = await state.kube.get(ref)
            if controller_uid(found) == job.controller:
                await state.kube.delete(ref, uid=found["metadata"]["uid"])
    if job.ended:
        await state.kube.delete(JOBS(job.namespace, job.name), uid=job.uid)


async def _confirm(state: State, seen: Seen) -> None:
    """Nothing was written that would have failed had another leader gone further: ask, before children are made."""
    live = await state.kube.get(FINETUNEJOBS(seen.namespace, seen.name))
    if live["metadata"]["uid"] != seen.uid or live["metadata"]["resourceVersion"] != seen.version:
        state.cache.put(live)
        raise Stale(f"{seen.namespace}/{seen.name} has changed")


async def _create(state: State, seen: Seen, plan: Plan) -> None:
    job = plan.resolved
    state.refusals.pop(seen.uid, None)  # of an earlier try, perhaps of another spec
    around = state.surroundings(job.namespace, job.name)
    if plan.preflight:
        wanted = children.build_preflight(job, number=plan.preflight, grace_seconds=plan.grace_seconds, around=around)
    else:
        wanted = children.build(job, attempt=plan.attempt, grace_seconds=plan.grace_seconds, around=around)
    try:
        await _create_one(state, seen, CONFIGMAPS(job.namespace), wanted.config_map)
        if wanted.service:
            await _create_one(state, seen, SERVICES(job.namespace), wanted.service)
        state.cache.put_child(await _create_one(state, seen, JOBS(job.namespace), wanted.job))
    except (Forbidden, Invalid) as error:
        state.refusals[seen.uid] = Refusal(error.message, lasting=isinstance(error, Invalid))
        raise
    except NameTaken as error:
        state.refusals[seen.uid] = Refusal(str(error), lasting=False)
        raise


async def _create_one(state: State, seen: Seen, collection: Ref, body: Json) -> Json:
    """Creates a child, or accepts the one that an earlier pass has created."""
    try:
        return await state.kube.create(collection, body, brief=collection.resource != JOBS)
    except AlreadyExists:
        name = body["metadata"]["name"]
        found = await state.kube.get(collection.resource(seen.namespace, name))
        if controller_uid(found) != seen.uid:
            raise NameTaken(
                f"{collection.resource.plural} {seen.namespace}/{name} exists and is not of this job: delete it"
            ) from None
        if "deletionTimestamp" in found["metadata"]:
            raise Conflict(
                409, {"message": f"{name} is still being deleted"}, None, f"POST {collection.path()}"
            ) from None
        return found
