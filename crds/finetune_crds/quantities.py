"""Kubernetes quantities as numbers, to be compared and divided."""

import re
from decimal import Decimal
from typing import Final

_BINARY: Final = {suffix: 1024 ** (i + 1) for i, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))}
_DECIMAL: Final = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_PARTS: Final = re.compile(r"([-+]?[0-9.]+)([eE][-+]?[0-9]+)?([A-Za-z]*)")


def amount(quantity: str) -> Decimal:
    """ "500m" -> 0.5, "4Gi" -> 4294967296."""
    found = _PARTS.fullmatch(quantity)
    if found is None:
        raise ValueError(f"{quantity!r} is no quantity")
    number, exponent, suffix = found.groups()
    value = Decimal(number + (exponent or ""))
    return value * _BINARY[suffix] if suffix in _BINARY else value.scaleb(_DECIMAL[suffix])
