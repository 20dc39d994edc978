"""What spec and status share: the base model, string types of the wire, and CEL rules that travel with a model.

Floats do not exist in the API (they do not survive a round trip through every client), so decimals are strings.
"""

import re
from typing import Annotated, Any, ClassVar, Final, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.json_schema import WithJsonSchema


class Rule(NamedTuple):
    """One CEL rule of the schema and the sentence that a user reads when it does not hold."""

    cel: str
    message: str


class ApiModel(BaseModel):
    """A JSON object of the API: camelCase on the wire, unknown fields refused, descriptions from the docstrings."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    def to_wire(self) -> dict[str, Any]:
        """The object as the API server sees it: camelCase, unset fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def exactly_one(*fields: str, sentence: str) -> Rule:
    """A rule for a union that is spelled as optional fields of which one is set."""
    listed = ", ".join(f"has(self.{field})" for field in fields)
    return Rule(f"[{listed}].filter(x, x).size() == 1", sentence)


def at_most_one(*fields: str, sentence: str) -> Rule:
    """A rule for fields that exclude each other."""
    listed = ", ".join(f"has(self.{field})" for field in fields)
    return Rule(f"[{listed}].filter(x, x).size() <= 1", sentence)


MUST_BE: Final[dict[str, str]] = {}
"""What a string with a pattern must be, in words; validation.py says so in place of the pattern."""


def spelled(pattern: str, must_be: str, **limits: Any) -> Any:
    """The field of a string with a pattern, and what it must be in words."""
    MUST_BE[pattern] = must_be
    return Field(pattern=pattern, **limits)


Decimal = Annotated[
    str,
    spelled(
        r"^[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$",
        'a number from 0 upwards in quotes, such as "0.05" or "2e-4"',
        max_length=32,
    ),
]
"""A non-negative decimal number as a string: "3", "0.05", "2e-4"."""

SignedDecimal = Annotated[
    str,
    spelled(r"^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$", 'a number in quotes, such as "0.5" or "-1"', max_length=32),
]
"""A decimal number as a string."""

Fraction = Annotated[
    str,
    spelled(
        r"^(0(\.[0-9]+)?|1(\.0+)?|[0-9](\.[0-9]+)?[eE]-0*[1-9][0-9]*|[0-9]{2}(\.[0-9]+)?[eE]-0*([2-9]|[1-9][0-9]+))$",
        'a number from 0 to 1 in quotes, such as "0.05"',
        max_length=32,
    ),
]
"""A decimal from 0 to 1 as a string."""

_QUANTITY = (
    r"^\+?([0-9]*[1-9][0-9]*(\.[0-9]*)?|[0-9]*\.[0-9]*[1-9][0-9]*)(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?[0-9]+))?$"
)


def _quantity(value: Any) -> Any:
    if (type(value) is int and value > 0) or (
        isinstance(value, str) and len(value) <= 32 and re.fullmatch(_QUANTITY, value)
    ):
        return value
    raise ValueError(f'{value!r} is no quantity above 0: write a number of units such as 4, "500m" or "32Gi"')


Quantity = Annotated[
    int | str,
    BeforeValidator(_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "minimum": 1,
            "pattern": _QUANTITY,
            "maxLength": 32,
        }
    ),
]
"""A Kubernetes quantity above 0: 4, "500m", "32Gi"."""

Text = Annotated[str, Field(max_length=1024)]
SetName = Annotated[
    str, spelled(r"^[a-z][a-z0-9]*$", "lower-case letters and digits, a letter first", min_length=1, max_length=24)
]
Name = Annotated[
    str,
    spelled(
        r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        "the name of an object: lower-case letters, digits, - and .",
        max_length=253,
    ),
]
"""The name of an object in the job's own namespace."""

Time = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
"""RFC 3339, UTC, seconds: 2026-01-31T12:00:00Z."""

Raw = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True, "x-kubernetes-map-type": "atomic"}),
]
"""An object of another API, passed through unread."""


def cel_list(names: tuple[str, ...]) -> str:
    """Names as a list in CEL."""
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"
