"""A text and what is to be made of it: a row is the source, then the target, each with the tokens that the tokenizer puts around it."""

from collections.abc import Sequence
from typing import Any, cast

from ..formats import Example, Pair
from .row import EncodedRow


class Pairs:
    """What is too long loses the end of its source first; of its target only what exceeds half of the row and the source leaves no room for.

    The token that ends a text stays: without it a model would never learn to end.
    """

    def __init__(self, tokenizer: Any, prefix: str, limit: int) -> None:
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._limit = limit

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder. A row's note is its target as text, which what a model writes is compared with."""
        pairs = cast(Sequence[Pair], examples)
        sources = self._tokenizer([self._prefix + one.source for one in pairs])["input_ids"]
        targets = self._tokenizer(text_target=[one.target for one in pairs])["input_ids"]
        return [[self._row(*one)] for one in zip(sources, targets, pairs, strict=True)]

    def source(self, text: str) -> list[int]:
        """Tokens of a source alone."""
        return self._cut(self._tokenizer(self._prefix + text)["input_ids"], self._limit)

    def _row(self, source: list[int], target: list[int], pair: Pair) -> EncodedRow:
        end = self._tokenizer.eos_token_id
        whole = target if target[-1:] == [end] else [*target, end]
        kept = self._cut(whole, max(self._limit // 2, self._limit - len(source)))
        read = self._cut(source, self._limit - len(kept))
        return EncodedRow(
            [*read, *kept],
            [False] * len(read) + [True] * len(kept),
            targets=len(kept) if read and len(whole) > 1 else 0,
            split=len(read),
            note=pair.target.encode(),
            truncated=len(read) + len(kept) < len(source) + len(whole),
        )

    def _cut(self, tokens: list[int], limit: int) -> list[int]:
        if len(tokens) <= limit:
            return tokens
        last = tokens[-1]
        closes = last in (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        return [*tokens[: limit - 1], last] if closes else tokens[:limit]
