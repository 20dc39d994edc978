"""Texts and what is told of them: a class, several, or a number."""

from collections.abc import Sequence
from typing import Any, cast

from ..formats import Example, Labelled
from .row import EncodedRow


def cut_tokens(tokenizer: Any, tokens: list[int], limit: int) -> list[int]:
    """As many as fit; what the tokenizer puts behind each text, such as an encoder's [SEP], stays."""
    cut = tokens[:limit]
    if len(tokens) > limit and tokens[-1] == tokenizer.sep_token_id:
        cut[-1] = tokens[-1]
    return cut


class TextClasses:
    """A text that is too long loses its end, but not a token that the tokenizer puts behind each text."""

    def __init__(self, tokenizer: Any, limit: int, *, keeps_texts: bool = False) -> None:
        """Args: tokenizer: the model's; limit: tokens of the longest row; keeps_texts: whether texts go along, to be changed in training."""
        self._tokenizer = tokenizer
        self._limit = limit
        self._keeps_texts = keeps_texts

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        texts = cast(Sequence[Labelled], examples)
        found = self._tokenizer([one.text for one in texts])["input_ids"]
        return [[self._row(tokens, one)] for tokens, one in zip(found, texts, strict=True)]

    def _row(self, tokens: list[int], example: Labelled) -> EncodedRow:
        cut = cut_tokens(self._tokenizer, tokens, self._limit)
        return EncodedRow(
            cut,
            labels=example.labels,
            targets=int(bool(cut)),
            note=example.text.encode() if self._keeps_texts else b"",
            truncated=len(tokens) > self._limit,
        )
