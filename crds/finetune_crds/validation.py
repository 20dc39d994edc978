"""The API server's checks, done here, so that `finetune local` refuses what it would: types strictly, CEL rules in the same words."""

import difflib
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import celpy
from pydantic import BaseModel, ValidationError

from .schema import openapi
from .v1alpha1 import MUST_BE, ApiModel, FineTuneJob

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class InvalidJob(ValueError):
    """A manifest breaks the schema. `problems` holds one sentence for each place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


_ENVIRONMENT: Final = functools.cache(celpy.Environment)
_SCHEMA: Final = functools.cache(openapi)
_LEVELS: Final = frozenset(
    ["expr", "conditionalor", "conditionaland", "relation", "addition", "multiplication", "unary", "member"]
)
"""Levels of CEL's grammar: a node of one child is there for precedence only, and cel-python would walk through it at each evaluation."""


@functools.cache
def _program(cel: str) -> Any:
    environment = _ENVIRONMENT()
    return environment.program(_without_levels(environment.compile(cel)))


def _without_levels(node: Any) -> Any:
    """A syntax tree, half as deep."""
    if not hasattr(node, "children"):
        return node
    below = node.children[0] if len(node.children) == 1 else None
    if node.data in _LEVELS and getattr(below, "data", None) in _LEVELS | {"primary", "member_dot"}:
        return _without_levels(below)
    node.children = [_without_levels(child) for child in node.children]
    return node


def check(manifest: dict[str, Any], *, cluster: bool) -> FineTuneJob:
    """Parses a manifest and evaluates every rule on it.

    Args:
        manifest: a FineTuneJob as read from YAML.
        cluster: also apply the rules that hold only in a cluster (no file:// locations).

    Raises:
        InvalidJob: with one sentence for each place that is wrong.
    """
    try:
        job = FineTuneJob.model_validate(manifest, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidJob([f"{_path(e['loc'])}: {_sentence(e)}" for e in error.errors()]) from None
    problems = list(_broken(job, "", cluster))
    if problems:
        raise InvalidJob(problems)
    return job


def _path(parts: Sequence[int | str]) -> str:
    """spec.dataset.train[0].uri"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


_MEANT: Final = {
    "gpu": "use resources.gpusPerNode",
    "gpus": "use resources.gpusPerNode",
    "limits": "use resources.cpu, memory and gpusPerNode, which are request and limit",
    "requests": "use resources.cpu, memory and gpusPerNode, which are request and limit",
    "nodeSelector": "use resources.nodeSelector",
    "tolerations": "use resources.tolerations",
    "affinity": "use resources.affinity",
    "ttlSecondsAfterFinished": "use cleanup.afterSeconds",
    "revision": "write it behind the name: hf://org/name@revision",
    "subset": "use config",
    "ppo": "use grpo",
    "columns.answer": "use completion, or answers for question-answering",
    "columns.response": "use completion",
    "columns.output": "use completion",
    "columns.instruction": "use prompt",
    "r": "use rank",
    "dora": "use lora: {useDora: true}",
    "lr": "use training.learningRate",
    "bf16": "use training.precision",
    "fp16": "use training.precision: bf16; there is no fp16",
    "fsdp": "remove it: GPUs divide what training takes without being asked, but for the weights",
    "deepspeed": "remove it: GPUs divide what training takes without being asked, but for the weights",
    "activationCheckpointing": "use gradientCheckpointing",
    "perDeviceTrainBatchSize": "use microBatchSize; batchSize is rows in a step over all GPUs",
    "gradientAccumulationSteps": "use accumulationSteps, or batchSize alone, which is rows in a step over all GPUs",
    "autoFindBatchSize": "remove it: without microBatchSize, what fits a GPU is found before the first step",
}
"""Names from elsewhere and what is meant, where they are none of ours; some only below one object."""


def _sentence(error: "ErrorDetails") -> str:
    """What is wrong and what to do: pydantic's words, but for the mistakes that are made most."""
    where, given = error["loc"], error["input"]
    name = str(where[-1]) if where else ""
    match error["type"]:
        case "extra_forbidden":
            return "there is no such field; " + _instead(name, where[:-1])
        case "string_type" if isinstance(given, (int, float)) and not isinstance(given, bool):
            return f'must be a string: write it in quotes, "{given}"'
        case "string_pattern_mismatch" if must_be := MUST_BE.get(error["ctx"]["pattern"]):
            return f"must be {must_be}"
        case "int_type" if isinstance(given, str) and given.isdecimal():
            return f"must be a number: write it without quotes, {given}"
        case "int_type" if unit := re.search(r"(Seconds|Minutes)$", name):
            return f"must be a whole number of {unit[0].lower()}, without a unit"
        case "model_type":
            return f"must be an object, such as {f'{name}: ' * name.isidentifier()}{_example(where, given)}"
        case "missing":
            return "is required"
    return error["msg"].removeprefix("Value error, ")


def _instead(name: str, parts: Sequence[int | str]) -> str:
    """What to write for a field that an object of the schema does not have."""
    fields = _node(parts)["properties"]
    if not fields:
        return f"{parts[-1]} has none: write {parts[-1]}: {{}}"
    below = f"{parts[-1]}.{name}" if parts else name
    if meant := _MEANT.get(below) or _MEANT.get(name):
        return meant
    if close := difflib.get_close_matches(name, fields, 1):
        return f"did you mean {close[0]}?"
    if len(fields) == 1:
        ((only, node),) = fields.items()
        return f"there is only {only}: {node['description']}"
    return f"there are {', '.join(fields)}"


def _example(parts: Sequence[int | str], given: object) -> str:
    """An object of the schema as its writer may have meant it."""
    node = _node(parts)
    fields = node["properties"]
    if isinstance(given, str) and given in fields:
        return f"{{{given}: {{}}}}"
    name = next(iter(node.get("required") or fields), None)
    if name is None:
        return "{}"
    fits = type(given) is {"string": str, "integer": int}.get(fields[name].get("type"))
    is_place = name != "uri" or "://" in str(given)
    return f"{{{name}: {given if fits and is_place else '...'}}}"


def _node(parts: Sequence[int | str]) -> dict[str, Any]:
    """An object of the schema."""
    node = _SCHEMA()
    for part in parts:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
    return node


def _broken(model: ApiModel, path: str, cluster: bool) -> list[str]:
    problems: list[str] = []
    context = {"self": celpy.json_to_cel(model.to_wire())}
    rules = model.rules + (getattr(model, "cluster_rules", ()) if cluster else ())
    for rule in rules:
        if not _program(rule.cel).evaluate(context):
            problems.append(f"{path or 'manifest'}: {rule.message}")
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        here = f"{path}.{field.alias}" if path else str(field.alias)
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if isinstance(child, BaseModel) and isinstance(child, ApiModel):
                problems += _broken(child, f"{here}[{i}]" if isinstance(value, list) else here, cluster)
    return problems
