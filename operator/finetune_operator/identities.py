"""Names, labels and owner reference of an attempt's children, and the digest that tells when the pods must be made anew."""

import hashlib
import json
from typing import Any

from finetune_crds import names
from finetune_crds.v1alpha1 import API_VERSION, KIND

Json = dict[str, Any]

_CHANGEABLE = ("suspend", "retries", "activeDeadlineSeconds", "cleanup", "preflight")
"""Fields of the spec that no pod sees."""


def child_name(job_name: str, uid: str, attempt: int) -> str:
    """Name of an attempt's Job, Service and ConfigMap: at most 40 + 15 characters, so that pods keep valid host names.

    The hash keeps a re-created FineTuneJob of the same name apart from its predecessor's children.
    """
    return f"{job_name}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}-a{attempt}"


def preflight_name(job_name: str, uid: str, number: int) -> str:
    """Name of a preflight's Job and ConfigMap."""
    return f"{job_name}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}-p{number}"


def preflight_labels(job_name: str, uid: str, number: int) -> dict[str, str]:
    """Labels of a preflight's children: no attempt's, so that nothing takes its pod for one that trains."""
    return {name: value for name, value in labels(job_name, uid, 0).items() if name != names.LABEL_ATTEMPT} | {
        names.LABEL_PREFLIGHT: str(number)
    }


def labels(job_name: str, uid: str, attempt: int) -> dict[str, str]:
    """Labels of every child."""
    return {
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_JOB: job_name,
        names.LABEL_UID: uid,
        names.LABEL_ATTEMPT: str(attempt),
    }


def owner_reference(job_name: str, uid: str) -> Json:
    """Makes the garbage collector delete a child with its FineTuneJob, whether or not an operator runs."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job_name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def template_digest(spec: Json) -> str:
    """sha256 over what the user wrote, but for what no pod sees. Defaults are not in it: a changed default changes no job."""
    kept = {field: value for field, value in spec.items() if field not in _CHANGEABLE}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
