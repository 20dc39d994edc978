"""Prompts that the model is to answer by itself. Called by prepare.

A row of the prepared set holds the prompt's tokens alone, up to where the answer begins; its note says what judges need to know of it.
"""

import json
from collections.abc import Sequence
from typing import Any, cast

from finetune_crds.resolved import ResolvedGrpo

from ...errors import DataError
from ..formats import Example, Prompt
from .language import Language
from .row import EncodedRow


class Prompts:
    """What is too long loses its beginning, but not the token that begins every text: a question comes at the end."""

    def __init__(self, tokenizer: Any, settings: ResolvedGrpo, length: int) -> None:
        """Args: settings: the objective's; length: of prompt and answer together."""
        assert settings.max_completion_length, "setup decides it"
        self._language = Language(tokenizer, None, length)
        self._limit = length - settings.max_completion_length
        self._begin: int | None = tokenizer.bos_token_id
        self._columns = [reward.reference.column for reward in settings.rewards if reward.reference]
        self._whole_row = any(reward.entry_point for reward in settings.rewards)

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        return [[self._row(cast(Prompt, one), place)] for one, place in zip(examples, places, strict=True)]

    def _row(self, example: Prompt, place: str) -> EncodedRow:
        tokens = self._language.asked(example.asked, place)
        truncated = len(tokens) > self._limit
        if truncated:
            kept = tokens[-self._limit :]
            tokens = [tokens[0], *kept[1:]] if tokens[0] == self._begin else kept
        for column in self._columns:
            if not isinstance(example.row.get(column), str | int | float):
                raise DataError(
                    f"{place}: column {column!r}, which objective.grpo.rewards names as the reference, must be text or a number"
                )
        columns = example.row if self._whole_row else {column: example.row[column] for column in self._columns}
        note = {"asked": example.plain, "columns": columns}
        return EncodedRow(tokens, note=json.dumps(note, ensure_ascii=False, default=str).encode(), truncated=truncated)
