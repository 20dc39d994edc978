"""Reward functions such as users write, called as TRL calls them."""

import re
from typing import Any

SECRET = "what a row says"


def lengths(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Of each completion as it came, in tokens and in letters, and of a column."""
    texts = _texts(completions)
    hints = columns.get("hint", [""] * len(texts))
    return [
        len(ids) + 100 * len(text) + 10_000 * len(hint)
        for ids, text, hint in zip(completion_ids, texts, hints, strict=True)
    ]


def fails(**_: Any) -> list[float]:
    """Raises."""
    raise KeyError(SECRET)


def infinite(completions: list[Any], **_: Any) -> list[float]:
    """Gives no number."""
    return [float("inf")] * len(completions)


def short(**_: Any) -> list[float]:
    """Gives too few."""
    return [1.0]


def nothing(completions: list[Any], **_: Any) -> list[float | None]:
    """Judges none."""
    return [None] * len(completions)


def vowels(completions: list[Any], **_: Any) -> list[float | None]:
    """Judges texts that have some."""
    return [float(len(re.findall("[aeiou]", text))) or None for text in _texts(completions)]


def capitals(completions: list[Any], **_: Any) -> list[float | None]:
    """The same of capital letters."""
    return [float(len(re.findall("[A-Z]", text))) or None for text in _texts(completions)]


def _texts(completions: list[Any]) -> list[str]:
    return [said if isinstance(said, str) else said[0]["content"] for said in completions]
