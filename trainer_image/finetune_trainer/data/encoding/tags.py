"""Words and their tags. A word's tag is that of its first token; its other tokens are not learned, as is usual since BERT (Devlin et al. 2019)."""

import json
from collections.abc import Sequence
from typing import Any, cast

from ..formats import Example, Tagged
from .row import EncodedRow


class Tags:
    """What is too long loses its end, but not the token that closes it. The note lists words without a token, each as [number, tag]; empty: there are none."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        texts = cast(Sequence[Tagged], examples)
        found = self._tokenizer([one.words for one in texts], is_split_into_words=True)
        return [[self._row(tokens, found.word_ids(i), texts[i].tags)] for i, tokens in enumerate(found["input_ids"])]

    def _row(self, tokens: list[int], words: list[int | None], tags: list[str]) -> EncodedRow:
        cut, truncated = tokens[: self._limit], len(tokens) > self._limit
        first = [
            word is not None and (at == 0 or word != words[at - 1]) for at, word in enumerate(words[: self._limit])
        ]
        if truncated and tokens[-1] == self._tokenizer.sep_token_id:
            cut[-1], first[-1] = tokens[-1], False
        labels = [tags[words[at] or 0] if begins else None for at, begins in enumerate(first)]
        seen = {words[at] for at, begins in enumerate(first) if begins}
        unseen = [(word, tag) for word, tag in enumerate(tags) if word not in seen]
        note = json.dumps(unseen, separators=(",", ":")).encode() if unseen else b""
        return EncodedRow(cut, labels=labels, targets=sum(first), note=note, truncated=truncated)
