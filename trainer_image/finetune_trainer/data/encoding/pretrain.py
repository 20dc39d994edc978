"""Plain text to go on learning from. A long one becomes several rows, and no token of it is lost."""

from collections.abc import Sequence
from typing import Any

from ..formats import Example
from .language import Language
from .row import EncodedRow


class Pretrain:
    """Each row begins with the last token of the one before, from which its first own token is told: every token is learned once."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._language = Language(tokenizer, None, limit)
        self._limit = limit

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        return [self._rows(one.tokens) for one in self._language.masked(examples, places)]

    def _rows(self, tokens: list[int]) -> list[EncodedRow]:
        pieces = [tokens[i : i + self._limit] for i in range(0, max(1, len(tokens) - 1), self._limit - 1)]
        return [EncodedRow(piece, [True] * len(piece), targets=len(piece) - 1) for piece in pieces]
