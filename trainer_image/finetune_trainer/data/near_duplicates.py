"""Rows that nearly equal each other: MinHash (Broder 1997) over runs of five words, banded as for FineWeb (Penedo et al. 2024).

The part of equal places in two signatures estimates how much of their runs two texts have in common (Jaccard). Only rows that agree in a
whole band are compared: at a similarity of 0.8 that misses 8 in 100, at 0.9 one in ten thousand. `signature` is called by prepare, `repeated` by selection.
"""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

RUN: Final = 5
"""Words of a run."""
BANDS: Final = 14
WIDTH: Final = 8
"""Places of a band."""
SIZE: Final = BANDS * WIDTH
SAME: Final = 0.8
"""From this part of equal places on two rows are nearly equal."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
"""A character is a word where words have no spaces between them (Chinese, Japanese, Thai, ...)."""
_MULTIPLIERS, _OFFSETS = np.random.default_rng(1997).integers(0, 1 << 63, (2, SIZE), dtype=np.uint64)
_MULTIPLIERS = _MULTIPLIERS * np.uint64(2) + np.uint64(1)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 8192


def words(example: Any) -> list[str]:
    """What of a row is compared: its words, case and punctuation aside, and no system message, which many rows share."""
    text = " ".join(_texts(example))
    return _WORD.findall(text.lower()) or [text]


def signature(of: list[str]) -> NDArray[np.uint32]:
    """The MinHash signature of some words, (SIZE)."""
    hashes = np.fromiter((crc32(word.encode()) for word in of), np.uint64, len(of))
    run = min(RUN, len(of))
    runs = np.zeros(len(of) - run + 1, np.uint64)
    for i in range(run):
        runs = runs * _PRIME + hashes[i : i + len(runs)]
    runs ^= runs >> np.uint64(31)
    runs = np.unique(runs * _PRIME)
    least = np.full(SIZE, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(runs), _AT_ONCE):
        each = (runs[start : start + _AT_ONCE, None] * _MULTIPLIERS + _OFFSETS) >> np.uint64(32)
        least = np.minimum(least, each.min(axis=0).astype(np.uint32))
    return least


def repeated(
    signatures: NDArray[np.uint32], order: NDArray[np.int64], references: int | None = None
) -> NDArray[np.bool_]:
    """For each row in `order` whether it nearly equals one before it that does not.

    Args:
        signatures: (rows, SIZE); may be a mapped file.
        order: rows to look at.
        references: only the first so many can be equalled; None: all.
    """
    most = len(order) if references is None else references
    found = np.zeros(len(order), np.bool_)
    for band in range(BANDS):
        keys = _keys(signatures, order, band)
        left = np.flatnonzero(~found)
        left = left[np.argsort(keys[left], kind="stable")]
        while len(left) > 1:  # each group of equal keys against its first; then what is left of it
            first = np.append(True, np.diff(keys[left]) != 0)
            heads = left[first][np.cumsum(first) - 1]
            compared = ~first & (heads < most)
            left, heads = left[compared], heads[compared]
            same = _nearly_equal(signatures, order[left], order[heads])
            found[left[same]] = True
            left = left[~same]
    return found


def _keys(signatures: NDArray[np.uint32], order: NDArray[np.int64], band: int) -> NDArray[np.uint64]:
    """One number for each row's band."""
    keys = np.zeros(len(order), np.uint64)
    for start in range(0, len(order), _AT_ONCE):
        part = signatures[order[start : start + _AT_ONCE], band * WIDTH : (band + 1) * WIDTH].astype(np.uint64)
        for i in range(WIDTH):
            keys[start : start + _AT_ONCE] = keys[start : start + _AT_ONCE] * _PRIME + part[:, i]
    return keys


def _nearly_equal(
    signatures: NDArray[np.uint32], one: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.bool_]:
    same = np.empty(len(one), np.bool_)
    for start in range(0, len(one), _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        same[here] = (signatures[one[here]] == signatures[other[here]]).mean(axis=1) >= SAME
    return same


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        if value.get("role") != "system":
            for key, one in value.items():
                if key != "role":
                    yield from _texts(one)
    elif is_dataclass(value):
        for name, one in vars(value).items():
            if name not in ("system", "tools", "row"):
                yield from _texts(one)
