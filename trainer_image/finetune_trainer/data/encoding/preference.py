"""Answers compared: pairs of a better and a worse one, or single ones that are good or bad. Called by prepare.

A row holds two sequences behind each other, each a prompt with an answer, and says where the second begins. They never see each other.
Learned of each is its answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, cast

from ...errors import DataError
from ..formats import Answer, Chat, Example, Feedback, Instruction, Preference, Text
from ..templates import Encoded
from .language import Language
from .row import EncodedRow, Label


class Preferences:
    """The better answer, then the worse. The row's label is the margin between them."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._sequences = _Sequences(tokenizer, limit)

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        pairs = cast(Sequence[Preference], examples)
        found = self._sequences.encode([(one.chosen, one.rejected) for one in pairs], places)
        return [[self._sequences.row(*both, [one.margin])] for both, one in zip(found, pairs, strict=True)]


class Feedbacks:
    """Single answers, for KTO; a pair becomes two of them. The row's label is 1 for a good one, else 0.

    The second sequence is the prompt with another row's answer, from which KTO estimates how far the model has moved: that of the row
    before. The very first has that of the last which is encoded with it, as TRL has within a batch.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._sequences = _Sequences(tokenizer, limit)
        self._before: Chat | Instruction | None = None

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        single = [_single(one, place) for one, place in zip(examples, places, strict=True)]
        listed = [one for those in single for one in those]
        named = [place for those, place in zip(single, places, strict=True) for _ in those]
        answers = [one.answer for one in listed]
        before = [self._before or answers[-1], *answers[:-1]]
        self._before = answers[-1]
        others = [_with_answer_of(one, other) for one, other in zip(answers, before, strict=True)]
        found = self._sequences.encode(list(zip(answers, others, strict=True)), named)
        rows = iter(self._sequences.row(*both, [float(one.good)]) for both, one in zip(found, listed, strict=True))
        return [[next(rows) for _ in those] for those in single]


def _single(example: Example, place: str) -> Sequence[Feedback]:
    if not isinstance(example, Preference):
        return [cast(Feedback, example)]
    if isinstance(example.chosen, Text) or isinstance(example.rejected, Text):
        raise DataError(
            f"{place}: objective.kto pairs prompts with answers of other rows, and this row has no prompt; add a column prompt, or use messages"
        )
    return [Feedback(example.chosen, True), Feedback(example.rejected, False)]


def _with_answer_of(one: Chat | Instruction, other: Chat | Instruction) -> Chat | Instruction:
    """A prompt with the answer to another one."""
    if isinstance(one, Instruction) and isinstance(other, Instruction):
        return replace(one, completion=other.completion)
    first, second = (it.chat if isinstance(it, Instruction) else it for it in (one, other))
    return replace(first, messages=[*first.messages[: first.given], *second.messages[second.given :]])


class _Sequences:
    """Two sequences at a time."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._language = Language(tokenizer, None, limit)
        self._begin: int | None = tokenizer.bos_token_id
        self._limit = limit

    def encode(self, pairs: Sequence[tuple[Answer, Answer]], places: Sequence[str]) -> list[tuple[Encoded, Encoded]]:
        """Tokens and masks, however long."""
        found = self._language.masked(
            [one for pair in pairs for one in pair], [place for place in places for _ in range(2)]
        )
        return [
            _behind_common_beginning(*both) if isinstance(pair[0], Text) else both
            for pair, both in zip(pairs, zip(found[::2], found[1::2], strict=True), strict=True)
        ]

    def row(self, first: Encoded, second: Encoded, labels: Sequence[Label]) -> EncodedRow:
        """The row of two sequences.

        An answer that is too long loses its end, but not so that less than half of the longest sequence is left of it; rather the prompt
        loses its beginning, the same of both, but not the token that begins every text.
        """
        both = (first, second)
        excess = [_begins(one) + min(len(one.tokens) - _begins(one), self._limit // 2) - self._limit for one in both]
        dropped = max(0, *excess)
        cut = [self._cut(one, dropped) for one in both]
        return EncodedRow(
            [token for one in cut for token in one.tokens],
            [learned for one in cut for learned in one.learned],
            labels=labels,
            targets=int(all(any(one.learned[1:]) for one in cut)),
            split=len(cut[0].tokens),
            truncated=any(len(one.tokens) > self._limit for one in both),
        )

    def _cut(self, one: Encoded, dropped: int) -> Encoded:
        kept = list(range(dropped, min(len(one.tokens), dropped + self._limit)))
        if dropped and one.tokens[0] == self._begin:
            kept[0] = 0
        return Encoded([one.tokens[i] for i in kept], [one.learned[i] for i in kept])


def _begins(one: Encoded) -> int:
    """Tokens of the prompt."""
    return one.learned.index(True) if any(one.learned) else len(one.tokens)


def _behind_common_beginning(first: Encoded, second: Encoded) -> tuple[Encoded, Encoded]:
    """Learned is what differs, and the end of each at least."""
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first.tokens, second.tokens, strict=False)))
    same = min(same, len(first.tokens) - 1, len(second.tokens) - 1)
    return first._replace(learned=_behind(same, first)), second._replace(learned=_behind(same, second))


def _behind(given: int, one: Encoded) -> list[bool]:
    return [i >= given for i in range(len(one.tokens))]
