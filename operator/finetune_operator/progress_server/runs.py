"""May this pod speak for this job, now? The pod that a token is bound to must be a live one of the job's current run.

What the replica's watches have seen answers nearly always; before a refusal that a lagging watch could explain the object
is read live, because a stock callback that is refused once may not try again for long.
"""

from datetime import datetime
from typing import NamedTuple

from ..cache import Cache
from ..kube import FINETUNEJOBS, JOBS, PODS, Kube, NotFound
from ..views import FineTuneJobView, PodView, finetunejob_view, job_view, pod_view
from .refusals import Refused
from .reviews import Bearer


class Run(NamedTuple):
    """A pod that may report, and whose progress it reports."""

    namespace: str
    name: str
    uid: str
    """Of the FineTuneJob."""
    attempt: int
    pod: str
    pod_created: datetime
    pod_started: datetime
    """When the training container started, as far as the watch knows; else as pod_created."""
    stop: str
    """Why the trainer is to stop; empty to go on."""


class Runs:
    """Admits pods."""

    def __init__(self, kube: Kube, cache: Cache) -> None:
        self._kube = kube
        self._cache = cache

    async def admit(self, namespace: str, name: str, bearer: Bearer) -> Run:
        """The run that this token's pod belongs to.

        Raises:
            Refused: 403, another job's pod or none; 409, a run whose time is over.
            ApiError, Unreachable: an object could not be read.
        """
        if bearer.namespace != namespace:
            raise Refused(403, f"the token is of a pod in namespace {bearer.namespace}, not {namespace}")
        pod = await self._pod(bearer)
        if pod.owner_name != name:
            raise Refused(403, f"pod {pod.name} does not belong to FineTuneJob {name}")
        if pod.is_preflight:
            raise Refused(403, f"pod {pod.name} is a preflight: it does not train and reports nothing")
        if pod.ended:
            raise Refused(409, f"pod {pod.name} has ended")
        job = await self._job(namespace, name, pod)
        over = has_ended(job, pod.attempt)
        if over:
            raise Refused(409, over)
        if job.attempt != pod.attempt or not await self._controls(job, pod):
            raise Refused(403, f"pod {pod.name} is not controlled by the Job of attempt {job.attempt}")
        if any(_replaces(other, pod) for other in self._cache.pods_of(job.uid)):
            raise Refused(409, f"another pod has taken the place of {pod.name}")
        return Run(
            namespace=namespace,
            name=name,
            uid=job.uid,
            attempt=pod.attempt,
            pod=pod.name,
            pod_created=datetime.fromisoformat(pod.created),
            pod_started=datetime.fromisoformat(pod.running_since or pod.created),
            stop=job.stop,
        )

    async def _pod(self, bearer: Bearer) -> PodView:
        pod = self._cache.pod(bearer.pod_uid)
        if pod is None:
            try:
                pod = pod_view(await self._kube.get(PODS(bearer.namespace, bearer.pod)))
            except NotFound:
                raise Refused(403, f"pod {bearer.pod} is gone") from None
        if pod.uid != bearer.pod_uid:
            raise Refused(403, f"another pod is named {bearer.pod} now")
        return pod

    async def _job(self, namespace: str, name: str, pod: PodView) -> FineTuneJobView:
        job = self._cache.job(namespace, name)
        if job is None or job.uid != pod.owner or job.attempt < pod.attempt:
            try:
                job = finetunejob_view(await self._kube.get(FINETUNEJOBS(namespace, name)))
            except NotFound:
                raise Refused(409, f"FineTuneJob {name} was deleted") from None
        if job.uid != pod.owner:
            raise Refused(409, f"FineTuneJob {name} was deleted and made again")
        return job

    async def _controls(self, job: FineTuneJobView, pod: PodView) -> bool:
        child = self._cache.children_of(job.uid).get(job.job_name)
        if child is None:
            try:
                child = job_view(await self._kube.get(JOBS(job.namespace, job.job_name)))
            except NotFound:
                return False
        return child.uid == pod.controller and child.controller == job.uid


def has_ended(job: FineTuneJobView, attempt: int) -> str:
    """Why this attempt may no longer report, as a sentence; empty while it may."""
    if job.finished:
        return "the job has ended"
    if job.attempt > attempt:
        return f"attempt {job.attempt} has taken the place of attempt {attempt}"
    return ""


def _replaces(other: PodView, pod: PodView) -> bool:
    return (
        (other.attempt, other.index) == (pod.attempt, pod.index)
        and other.uid != pod.uid
        and not other.gone
        and other.created > pod.created
    )
