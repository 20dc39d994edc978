"""Why pods do not run yet, in the words of whoever holds them back: scheduler, kubelet, quota. Waiting is not failing. Pure."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from finetune_crds.names import Reason

from .views import PodView

STARTING = frozenset({"ContainerCreating", "PodInitializing"})
"""What the kubelet says of a pod that is on its way."""
_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"})
_OBJECT = re.compile(
    r"(persistentvolumeclaim|secret|configmap|serviceaccount|service account|priorityclass|runtimeclass)s?\b.*"
    r"(not found|is being deleted|unbound)|non-existent config key|couldn't find key|references non-existent|"
    r"exists and is not of this job",
    re.IGNORECASE,
)


class Note(NamedTuple):
    """An event of the API server about a pod or a Job."""

    reason: str
    message: str


class Wait(NamedTuple):
    """What is missing."""

    reason: Reason
    message: str


def explain(pods: Iterable[PodView], notes: Iterable[Note]) -> Wait | None:
    """What the pods wait for; None when nothing tells (yet).

    Args:
        pods: those that neither run nor have ended.
        notes: recent events about them and their Job, the latest first.
    """
    for pod in pods:
        if pod.unschedulable:
            return Wait(_kind(pod.unschedulable, Reason.WAITING_FOR_NODES), pod.unschedulable)
        if pod.waiting in _IMAGE:
            return Wait(Reason.WAITING_FOR_IMAGE, f"{pod.waiting}: {pod.waiting_message}")
        if pod.waiting and pod.waiting not in STARTING:
            return Wait(Reason.WAITING_FOR_OBJECT, f"{pod.waiting}: {pod.waiting_message}")
    for note in notes:
        if note.reason == "FailedCreate":
            return Wait(_kind(note.message, Reason.WAITING_FOR_QUOTA), note.message)
        if note.reason in ("FailedMount", "FailedAttachVolume"):
            return Wait(Reason.WAITING_FOR_OBJECT, note.message)
    return None


def refused(message: str) -> Wait:
    """The API server does not let a child be created, now."""
    return Wait(_kind(message, Reason.WAITING_FOR_QUOTA), message)


def _kind(message: str, otherwise: Reason) -> Reason:
    return Reason.WAITING_FOR_OBJECT if _OBJECT.search(message) else otherwise
