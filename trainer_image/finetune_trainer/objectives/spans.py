"""Answers that stand in a text: extractive question answering, measured as SQuAD does (Rajpurkar et al. 2016, 2018)."""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_crds.resolved import ResolvedFineTune

from ..data import batches
from ..data.batches import Batch
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..modelling import anatomy
from ..modelling.models import Model
from ..ranks import Ranks
from .objective import Accumulator, Objective

BEST = 20
"""Most likely first and last tokens that are tried with each other."""
LONGEST = 30
"""Tokens of the longest answer, as in the reference script of BERT."""

Windows = dict[tuple[int, int], list[tuple[float, float, str, list[str]]]]
"""Of each question, by file and row: score, score of nothing, best answer and right answers of each of its windows."""


class Answers(Accumulator):
    """eval_exact_match and eval_f1, each question once: the best answer of all its windows, or none."""

    def __init__(self) -> None:
        super().__init__(0)
        self._found: Windows = {}

    def add_window(
        self, question: tuple[int, int], score: float, nothing: float, text: str, answers: list[str]
    ) -> None:
        """Adds the best answer of one window, and the score of there being none in it."""
        self._found.setdefault(question, []).append((score, nothing, text, answers))

    def merge(self, other: Accumulator) -> None:
        """See Accumulator."""
        assert isinstance(other, Answers)
        super().merge(other)
        self._take(other._found)

    def join(self, ranks: Ranks) -> None:
        """See Accumulator."""
        super().join(ranks)
        everywhere = ranks.gather(self._found)
        self._found = {}
        for found in everywhere:
            self._take(found)

    def _take(self, found: Windows) -> None:
        for question, windows in found.items():
            self._found.setdefault(question, []).extend(windows)

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        exact = overlap = 0.0
        for windows in self._found.values():
            score, _, text, answers = max(windows)
            said = text if score > min(nothing for _, nothing, _, _ in windows) else ""
            exact += max(_plain(said) == _plain(answer) for answer in answers or [""])
            overlap += max(_f1(said, answer) for answer in answers or [""])
        count = max(1, len(self._found))
        return {"eval_loss": self.loss, "eval_exact_match": exact / count, "eval_f1": overlap / count}


class SpanAnswers(Objective):
    """Cross-entropy of an answer's first and last token, the mean of both."""

    def __init__(self, spec: ResolvedFineTune, config: Any) -> None:
        self._anatomy = anatomy.of(config.model_type)
        self._types = getattr(config, "type_vocab_size", 0) > 1

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective. Targets are (rows, 2)."""
        flat = batches.flat(rows, sequences)
        targets = np.stack([rows.labels_of(row) for row in flat.rows]).astype(np.int64)
        types = [np.arange(length) >= rows.splits[row] for row, length in zip(flat.rows, flat.lengths, strict=True)]
        return flat.on(
            device,
            np.arange(len(flat.tokens)),
            targets,
            types=np.concatenate(types).astype(np.int64) if self._types else None,
            notes=[((int(rows.files[row]), int(rows.numbers[row])), rows.note(row)) for row in flat.rows],
        )

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        return self._loss(self.logits(model, batch), batch)

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(into, Answers)
        logits = self.logits(model, batch)
        into.add(self._loss(logits, batch), len(batch.targets))
        for window, (question, note) in zip(logits, batch.notes, strict=True):
            told = json.loads(note)
            score, text = _best(window.cpu(), told["begins"], told["characters"], told["context"])
            into.add_window(question, score, float(window[0].sum()), text, told["answers"])

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return Answers()

    def logits(self, model: Model, batch: Batch) -> Sequence[Tensor]:
        """For each row (tokens, 2): how likely each token is the first and the last, fp32."""
        both = self._anatomy.span_logits(model.inner, model.hidden(batch)).float()
        return torch.split(both, list(batch.documents.lengths))

    @staticmethod
    def _loss(logits: Sequence[Tensor], batch: Batch) -> Tensor:
        each = [F.cross_entropy(row.T, at, reduction="sum") for row, at in zip(logits, batch.targets, strict=True)]
        return torch.stack(each).sum() / 2


def _best(window: Tensor, begins: int, characters: Sequence[tuple[int, int]], context: str) -> tuple[float, str]:
    """The most likely answer of a window, with the sum of its two logits. window: (tokens, 2)."""
    inside = window[begins : begins + len(characters)]
    count = min(BEST, len(inside))
    starts, ends = (inside[:, i].topk(count).indices.tolist() for i in (0, 1))
    possible = [
        (float(inside[start, 0] + inside[end, 1]), start, end)
        for start in starts
        for end in ends
        if start <= end < start + LONGEST
    ]
    if not possible:
        return -float("inf"), ""
    score, start, end = max(possible)
    return score, context[characters[start][0] : characters[end][1]]


def _plain(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(said: str, answer: str) -> float:
    """Overlap of words; of two empty ones 1."""
    ours, theirs = _plain(said), _plain(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))
