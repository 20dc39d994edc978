"""Jobs whose output another job continues (model.job, model.adapter.job): what was seen of them, and what follows. Pure.

observe.py looks them up while no attempt is open, decide.py waits for them, specs.py writes what they published into the resolved job.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from finetune_crds.names import ConditionType, Reason
from finetune_crds.resolution import Published
from finetune_crds.v1alpha1 import FineTuneJobStatus

from .conditions import holds
from .waiting import Wait

Json = dict[str, Any]


class Upstream(NamedTuple):
    """A FineTuneJob that is continued."""

    spec: Json
    status: FineTuneJobStatus


class Unfit(ValueError):
    """What a job published cannot be continued; the text says why, and what to do."""


def names(spec: Json) -> Iterator[tuple[str, str]]:
    """Field and name of each job that a spec continues."""
    model: Json = spec.get("model", {})
    for field, reference in (("model.job", model), ("model.adapter.job", model.get("adapter", {}))):
        if "job" in reference:
            yield field, reference["job"]


def waits(spec: Json, own_name: str, found: Mapping[str, Upstream]) -> Wait | None:
    """The first job that is not Complete. One that failed may still be edited and tried again."""
    for field, name in names(spec):
        if name == own_name:
            return None  # it would wait for ever: published() says so
        there = found.get(name)
        if there is None:
            return Wait(Reason.WAITING_FOR_JOB, f"{field}: there is no FineTuneJob {name} in this namespace.")
        if holds(there.status, ConditionType.FAILED):
            return Wait(
                Reason.WAITING_FOR_JOB,
                f"{field}: FineTuneJob {name} has failed: edit it, or set finetune.dev/retry on it.",
            )
        if not holds(there.status, ConditionType.COMPLETE):
            return Wait(
                Reason.WAITING_FOR_JOB,
                f"{field}: FineTuneJob {name} is not Complete ({there.status.phase or 'Pending'}).",
            )
    return None


def published(spec: Json, own_name: str, found: Mapping[str, Upstream]) -> dict[str, Published]:
    """Outputs of complete jobs, by name.

    Raises:
        Unfit: one of them is not what the field can continue.
    """
    outputs = {}
    for field, name in names(spec):
        if name == own_name:
            raise Unfit(f"{field}: {name} is this very job; name the one that it continues")
        outputs[name] = _published(field, name, found[name])
    return outputs


def _published(field: str, name: str, there: Upstream) -> Published:
    output, method = there.status.output, _method(there.status)
    if output is None or not output.digest:
        raise Unfit(f"{field}: FineTuneJob {name} tells no digest of its output; name its place by uri")
    if field == "model.job" and output.format != "transformers":
        raise Unfit(
            f"{field}: FineTuneJob {name} published an adapter and no whole model; continue it by model.adapter.job, or let it publish output.merged"
        )
    if field == "model.adapter.job" and output.format == "transformers":
        raise Unfit(f"{field}: FineTuneJob {name} published a whole model and no adapter; continue it by model.job")
    if field == "model.adapter.job" and (output.format != "peft" or method not in ("lora", "qlora")):
        raise Unfit(
            f"{field}: FineTuneJob {name} published an adapter of method {method}; only those of lora and qlora can be continued"
        )
    place: Json = there.spec.get("output", {})
    return Published(output.uri, output.digest, place.get("endpoint"), place.get("region"))


def _method(status: FineTuneJobStatus) -> str:
    resolved: Json = status.resolved or {}
    return next(iter(resolved.get("method", {})), "unknown")
