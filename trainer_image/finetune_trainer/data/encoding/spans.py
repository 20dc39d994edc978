"""A question and a context that holds the answer, in windows where it is long (as in SQuAD: Rajpurkar et al. 2016, 2018).

A window without the answer, and a question that has none, is to point at its first token.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any, cast

from ...errors import DataError
from ..formats import Example, Question
from .row import EncodedRow

OVERLAP = 4
"""Neighbouring windows share one part in so many of the longest row, so that an answer cut by one is whole in the other."""


class Spans:
    """Each row is a window; its labels are the first and the last token of the answer."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # truncation stays set in it, and would be published
        self._limit = limit

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        return [
            self._windows(one, place) for one, place in zip(cast(Sequence[Question], examples), places, strict=True)
        ]

    def _windows(self, example: Question, place: str) -> list[EncodedRow]:
        tokenizer = self._tokenizer
        room = self._limit - len(tokenizer(example.question, "")["input_ids"])
        if room < 8:
            raise DataError(
                f"{place}: the question leaves {max(0, room)} tokens of training.sequenceLength {self._limit} for its context; lengthen sequenceLength, or remove the row"
            )
        found = tokenizer(
            example.question,
            example.context,
            truncation="only_second",
            max_length=self._limit,
            stride=max(1, room // OVERLAP),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        if 1 not in found.sequence_ids(0):
            raise DataError(f"{place}: the context holds no token of the model's tokenizer; correct or remove the row")
        rows = []
        for i, tokens in enumerate(found["input_ids"]):
            parts = found.sequence_ids(i)
            begins = parts.index(1)
            ends = len(parts) - parts[::-1].index(1)
            characters = found["offset_mapping"][i]
            start, end = self._answer(example, characters[begins:ends])
            labels = [begins + start, begins + end] if end >= 0 else [0, 0]
            note = {
                "begins": begins,
                "characters": characters[begins:ends],
                "context": example.context,
                "answers": example.answers,
            }
            rows.append(
                EncodedRow(
                    tokens, labels=labels, split=begins, note=json.dumps(note, separators=(",", ":")).encode(),
                )
            )  # fmt: skip
        return rows

    @staticmethod
    def _answer(example: Question, characters: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """First and last token of the first answer among these tokens, or (0, -1) where it is not whole."""
        if not example.answers:
            return 0, -1
        first = example.start
        last = first + len(example.answers[0])
        if first < characters[0][0] or last > characters[-1][1]:
            return 0, -1
        start = max(i for i, (begin, _) in enumerate(characters) if begin <= first)
        end = min(i for i, (_, end) in enumerate(characters) if end >= last)
        return start, end
