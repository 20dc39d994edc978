"""Texts and what is told of them: a class, several, or a number."""

from collections.abc import Sequence
from typing import Any, cast

from ..formats import Example, Labelled
from .row import EncodedRow


class TextClasses:
    """A text that is too long loses its end, but not a token that the tokenizer puts behind each text, such as an encoder's [SEP]."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        texts = cast(Sequence[Labelled], examples)
        found = self._tokenizer([one.text for one in texts])["input_ids"]
        return [[self._row(tokens, one)] for tokens, one in zip(found, texts, strict=True)]

    def _row(self, tokens: list[int], example: Labelled) -> EncodedRow:
        cut = tokens[: self._limit]
        truncated = len(tokens) > self._limit
        if truncated and tokens[-1] == self._tokenizer.sep_token_id:
            cut[-1] = tokens[-1]
        return EncodedRow(cut, labels=example.labels, targets=int(bool(cut)), truncated=truncated)
