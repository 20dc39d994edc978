"""From the user's spec to the pinned ResolvedJob of an attempt. decide.py calls it; pure."""

from pydantic import ValidationError

from finetune_crds import locations
from finetune_crds.resolution import Defaults, resolve
from finetune_crds.resolved import ResolvedJob
from finetune_crds.v1alpha1 import API_VERSION, KIND, Attempt, FineTuneJob, FineTuneJobSpec, FineTuneJobStatus

from . import upstream
from .decisions import Plan
from .seen import Seen

GRACE_MAX = 86_400
"""Seconds, as of checkpoints.gracePeriodSeconds: how long a save took is a program's own word, and pods must end."""


GRACE_PREFLIGHT = 30
"""Seconds that a preflight gets to end: it has nothing to save."""


_EARLIER = "status.resolved, which an earlier version wrote: "


class InvalidSpec(ValueError):
    """The stored spec breaks a rule of this version's schema; the text names field and fault."""


def plan_new(seen: Seen, attempt: int, defaults: Defaults) -> Plan:
    """Resolves the spec as it is now.

    Raises:
        InvalidSpec: an object that was stored under an older schema, say, or a job that it cannot continue.
    """
    metadata = {"name": seen.name, "namespace": seen.namespace, "uid": seen.uid}
    try:
        job = FineTuneJob.model_validate(
            {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": seen.spec}
        )
        _check_places(job.spec, "spec.")
        resolved = resolve(job, defaults, upstream.published(seen.spec, seen.name, seen.upstreams))
    except ValidationError as error:
        raise InvalidSpec(_faults(error, "")[:2048]) from None
    except upstream.Unfit as error:
        raise InvalidSpec(f"spec.{error}") from None
    return Plan(resolved, attempt, _grace(resolved, seen.status))


def plan_pinned(seen: Seen, attempt: Attempt, status: FineTuneJobStatus) -> Plan:
    """The attempt as status.resolved pins it."""
    resolved = pinned(seen, attempt.spec_digest, attempt.template_digest, status)
    return Plan(resolved, attempt.number, _grace(resolved, status))


def pinned(seen: Seen, digest: str, template: str | None, status: FineTuneJobStatus) -> ResolvedJob:
    """The job as status.resolved pins it: a retry, or an operator that was upgraded, changes nothing of it.

    An image by tag is that of its first run, by digest: exactness needs the same bits, and a tag may have moved on.

    Raises:
        InvalidSpec: an earlier version resolved it, and this one cannot read it.
    """
    names = {"name": seen.name, "namespace": seen.namespace, "uid": seen.uid}
    try:
        resolved = ResolvedJob.model_validate({**names, "digest": digest, "spec": status.resolved})
    except ValidationError as error:
        raise InvalidSpec(f"{_EARLIER}{_faults(error, '')}"[:2048]) from None
    _check_places(resolved.spec, _EARLIER)
    runtime = resolved.spec.runtime
    alike = [each for each in status.attempts or () if each.template_digest == template and each.image]
    ran = (alike[-1].image if alike else None) or ""
    if "@" not in runtime.image and ran.startswith(_repository(runtime.image) + "@sha256:"):
        runtime.image = ran
    return resolved


def _faults(error: ValidationError, below: str) -> str:
    return "; ".join(f"{below}{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())


def _check_places(spec: FineTuneJobSpec, below: str) -> None:
    for path, place in (*locations.inputs(spec), *locations.outputs(spec)):
        try:
            locations.parse(place.uri)
        except ValueError as error:
            raise InvalidSpec(f"{below}{path}.uri: {error}") from None


def _repository(image: str) -> str:
    """An image's name without its tag; a port of the registry is no tag."""
    path, colon, tag = image.rpartition(":")
    return path if colon and "/" not in tag else image


def _grace(resolved: ResolvedJob, status: FineTuneJobStatus) -> int:
    """Seconds to save in: what was asked for, and at least twice the longest save so far."""
    longest = (status.checkpoints and status.checkpoints.longest_save_seconds) or 0
    return max(resolved.spec.checkpoints.grace_period_seconds, min(2 * longest, GRACE_MAX))
