"""Jobs whose output another job reads (model.job, model.adapter.job, and those of reward models): what was seen of them, and what follows. Pure.

observe.py looks them up while no attempt is open, decide.py waits for them, specs.py writes what they published into the resolved job.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from finetune_crds.names import ConditionType, Reason
from finetune_crds.resolution import Published
from finetune_crds.resolved import ResolvedModel
from finetune_crds.v1alpha1 import FineTuneJobStatus, OutputStatus

from .conditions import holds
from .waiting import Wait

Json = dict[str, Any]
Use = Literal["model", "adapter", "judge", "judge's base", "judge's adapter"]


class Upstream(NamedTuple):
    """A FineTuneJob whose output is read."""

    spec: Json
    status: FineTuneJobStatus


class Reading(NamedTuple):
    """A field that names a job."""

    field: str
    job: str
    use: Use


class Unfit(ValueError):
    """What a job published is not what a field can read; the text says why, and what to do."""


def readings(spec: Json) -> Iterator[Reading]:
    """Each job that a spec reads the output of."""
    yield from _of_model("model", spec.get("model", {}), ("model", "model", "adapter"))
    rewards: list[Json] = spec.get("objective", {}).get("grpo", {}).get("rewards", [])
    for i, reward in enumerate(rewards):
        field = f"objective.grpo.rewards[{i}].model"
        yield from _of_model(field, reward.get("model", {}), ("judge", "judge's base", "judge's adapter"))


def _of_model(field: str, model: Json, uses: tuple[Use, Use, Use]) -> Iterator[Reading]:
    """Args: uses: of a model, of one that there is an adapter for, of the adapter."""
    alone, base, on_top = uses
    adapter: Json = model.get("adapter", {})
    if "job" in model:
        yield Reading(f"{field}.job", model["job"], base if adapter else alone)
    if "job" in adapter:
        yield Reading(f"{field}.adapter.job", adapter["job"], on_top)


def waits(spec: Json, own_name: str, found: Mapping[str, Upstream]) -> Wait | None:
    """The first job that is not Complete. One that failed may still be edited and tried again."""
    for field, name, _ in readings(spec):
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
        Unfit: one of them is not what the field can read.
    """
    outputs = {}
    for field, name, use in readings(spec):
        if name == own_name:
            raise Unfit(f"{field}: {name} is this very job; name the one that it continues")
        outputs[name] = _published(field, name, use, found[name])
    return outputs


def _published(field: str, name: str, use: Use, there: Upstream) -> Published:
    output = there.status.output
    if output is None or not output.digest:
        raise Unfit(f"{field}: FineTuneJob {name} tells no digest of its output; name its place by uri")
    resolved: Json = there.status.resolved or {}
    if wrong := _misfit(use, output, resolved):
        raise Unfit(f"{field}: FineTuneJob {name} published {wrong}")
    place: Json = there.spec.get("output", {})
    base = resolved.get("model") if output.format == "peft" else None
    return Published(
        output.uri,
        output.digest,
        place.get("endpoint"),
        place.get("region"),
        ResolvedModel.model_validate(base) if base else None,
    )


def _misfit(use: Use, output: OutputStatus, resolved: Json) -> str | None:
    """What was published instead, and what to do."""
    method = next(iter(resolved.get("method", {})), "unknown")
    whole, peft = output.format == "transformers", output.format == "peft"
    match use:
        case "model" if not whole:
            return "an adapter and no whole model; continue it by model.adapter.job, or let it publish output.merged"
        case "adapter" if whole:
            return "a whole model and no adapter; continue it by model.job"
        case "adapter" if not peft or method not in ("lora", "qlora"):
            return f"an adapter of method {method}; only those of lora and qlora can be continued"
        case "judge's base" if not whole:
            return "an adapter and no whole model for one to be put on; name it without model.adapter, or another base"
        case "judge's adapter" if whole:
            return "a whole model and no adapter; name it by model.job"
        case "judge" | "judge's adapter" if not (whole or peft):
            return f"an adapter of method {method}, which judges nothing; let it use another method"
        case "judge" | "judge's adapter" if "task" in resolved and not _scores(resolved):
            return "no reward model; name a job with objective reward"
        case "judge" if peft and "model" not in resolved:
            return (
                "an adapter, and does not tell of which model; name that by model.uri, and the job by model.adapter.job"
            )
    return None


def _scores(resolved: Json) -> bool:
    """Whether it trained a classifier with one output."""
    objective: Json = resolved.get("objective", {})
    return "reward" in objective or objective.get("classification", {}).get("problem") == "regression"
