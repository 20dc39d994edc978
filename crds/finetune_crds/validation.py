"""The API server's checks, done here, so that `finetune local` refuses what it would: types strictly, CEL rules in the same words."""

import difflib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import celpy
from pydantic import BaseModel, ValidationError

from .schema import openapi
from .v1alpha1 import ApiModel, FineTuneJob

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class InvalidJob(ValueError):
    """A manifest breaks the schema. `problems` holds one sentence for each place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


_ENVIRONMENT: Final = functools.cache(celpy.Environment)
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


def _sentence(error: "ErrorDetails") -> str:
    """What is wrong and what to do: pydantic's words, but for the mistakes that are made most."""
    match error["type"]:
        case "extra_forbidden":
            fields = _fields(error["loc"][:-1])
            close = difflib.get_close_matches(str(error["loc"][-1]), fields, 1)
            return "there is no such field; " + (
                f"did you mean {close[0]}?" if close else f"there are {', '.join(fields)}"
            )
        case "string_type" if isinstance(error["input"], (int, float)) and not isinstance(error["input"], bool):
            return f'must be a string: write it in quotes, "{error["input"]}"'
        case "missing":
            return "is required"
    return error["msg"].removeprefix("Value error, ")


def _fields(parts: Sequence[int | str]) -> list[str]:
    """Names of the fields that an object of the schema has."""
    node = openapi()
    for part in parts:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
    return list(node["properties"])


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
