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
        UserError: it is no JSON schema, or one that cannot be used; when called, a pattern in it takes too long.
    """
    import jsonschema
    from jsonschema_specifications import REGISTRY

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
    _check_parts(schema, kind, REGISTRY, where)
    limited = jsonschema.validators.extend(kind, _limited(where))  # type: ignore[no-untyped-call]
    validator = limited(schema, registry=REGISTRY)  # of the drafts themselves: nothing is fetched
    try:
        list(validator.iter_errors(None))
    except RecursionError:
        raise UserError(
            f"{where}: schema has a $ref that comes back to itself whatever the answer; remove it"
        ) from None

    def holds(said: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(said, parse_constant=_no_constant)))
        except (ValueError, OverflowError, RecursionError):
            return False

    return holds


def _check_parts(schema: Any, kind: Any, registry: Any, where: str) -> None:
    """Looks up each reference and compiles each pattern, of the schema and of what it refers to.

    Args:
        schema: the whole.
        kind: jsonschema's validator of its draft.
        registry: of what can be referred to besides.
        where: named in errors.
    """
    import jsonschema
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    draft = specification_with(kind.ID_OF(kind.META_SCHEMA))
    root = draft.create_resource(schema)
    found: list[tuple[Any, Any]] = [(root, registry.resolver_with_root(root))]
    seen: set[int] = set()
    while found:
        part, resolver = found.pop()
        node = part.contents
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        for pattern in (*node.get("patternProperties", ()), *([node["pattern"]] if "pattern" in node else ())):
            Pattern(pattern, where)
        for name in {"$ref", "$dynamicRef"} & kind.VALIDATORS.keys() & node.keys():
            try:
                there = resolver.lookup(node[name])
                jsonschema.validators.validator_for(there.contents, default=kind).check_schema(there.contents)
            except (Unresolvable, jsonschema.SchemaError) as error:
                raise UserError(
                    f"{where}: schema has {name} {node[name]!r}, where no schema is; it can refer to what is within itself only"
                ) from error
            found.append((draft.create_resource(there.contents), there.resolver))
        found += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]


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
