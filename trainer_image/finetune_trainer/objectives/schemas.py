"""JSON schemas as judges: what is fetched, and how long a pattern in one takes, is not left to the schema. Called by rewards."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import UserError
from .patterns import Pattern


def holds_for(text: str, where: str) -> Callable[[str], bool]:
    """Whether an answer is JSON, and nothing but JSON, that a schema holds for.

    Args:
        text: the schema.
        where: named in errors.

    Raises:
        UserError: it is no JSON schema; when called, a pattern in it takes too long.
    """
    import jsonschema
    from referencing import Registry

    try:
        schema = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: schema is not JSON: {error}") from error
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        path = "/".join(str(part) for part in error.absolute_path)
        raise UserError(f"{where}: schema is no JSON schema, at /{path}; correct it") from error
    if {"patternProperties", "unevaluatedProperties"} <= set(_keys(schema)):
        raise UserError(f"{where}: schema has patternProperties beside unevaluatedProperties; use additionalProperties")
    if isinstance(schema, dict):
        schema.pop("$schema", None)  # or `$ref: "#"` would go on without the limit
    limited = jsonschema.validators.extend(kind, _limited(where))  # type: ignore[no-untyped-call]
    validator = limited(schema, registry=Registry())  # nothing is fetched

    def holds(said: str) -> bool:
        try:
            value = json.loads(said, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return False
        return bool(validator.is_valid(value))

    return holds


def _limited(where: str) -> dict[str, Callable[..., Iterator[Any]]]:
    """The keywords that match patterns, by name."""
    import jsonschema

    known: dict[str, Pattern] = {}

    def found(pattern: str, text: str) -> bool:
        if pattern not in known:
            known[pattern] = Pattern(pattern, where)
        return known[pattern].search(text)

    def pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(value, "string") and not found(pattern, value):
            yield jsonschema.ValidationError("pattern")

    def pattern_properties(validator: Any, patterns: dict[str, Any], value: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(value, "object"):
            for pattern, inner in patterns.items():
                for name in value:
                    if found(pattern, name):
                        yield from validator.descend(value[name], inner)

    def additional_properties(validator: Any, inner: Any, value: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(value, "object"):
            for name in value.keys() - schema.get("properties", {}).keys():
                if not any(found(pattern, name) for pattern in schema.get("patternProperties", ())):
                    yield from validator.descend(value[name], inner)

    return {"pattern": pattern, "patternProperties": pattern_properties, "additionalProperties": additional_properties}


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _keys(child)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
