"""Tags of words: token classification."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finetune_crds.resolved import ResolvedFineTune

from ..data import batches
from ..data.batches import Batch
from ..data.packing import Sequence as Rows
from ..data.prepared import NOTHING, RowSet
from ..modelling import anatomy
from ..modelling.models import Model
from .classes import class_weights
from .majority import label_counts, log_shares
from .objective import Accumulator, Guess, Objective

Entity = tuple[str, int, int]
"""Type, first word, last word."""


class Entities(Accumulator):
    """eval_accuracy of tags; eval_f1, eval_precision and eval_recall of whole entities over all types (micro), as CoNLL's script counts them.

    A word that the model does not see counts as tagged O: where texts are cut must not make a model look better.
    """

    def __init__(self) -> None:
        super().__init__(5)

    def add_tags(self, predicted: Sequence[str], given: Sequence[str], unseen: bytes = b"") -> None:
        """Adds the tags of one text. Args: unseen: words without a token, as its row notes them."""
        predicted, given = list(predicted), list(given)
        for word, tag in json.loads(unseen or b"[]"):
            predicted.insert(word, "O")
            given.insert(word, tag)
        right = sum(one == other for one, other in zip(predicted, given, strict=True))
        found, there = set(entities(predicted)), set(entities(given))
        counts = [right, len(given), len(found & there), len(found), len(there)]
        self.sums[2:] += torch.tensor(counts, dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        right, words, both, found, there = (float(number) for number in self.sums[2:])
        return {
            "eval_loss": self.loss,
            "eval_accuracy": right / max(1.0, words),
            "eval_precision": both / max(1.0, found),
            "eval_recall": both / max(1.0, there),
            "eval_f1": 2 * both / max(1.0, found + there),
        }


class Tagging(Objective):
    """Cross-entropy of each word's tag, times the weight of the tag; eval_loss is without weights."""

    def __init__(self, spec: ResolvedFineTune, config: Any, rows: RowSet) -> None:
        self._anatomy = anatomy.of(config.model_type)
        self._names = rows.index.classes
        self._weights = class_weights(spec, rows)
        self._smoothing = float(spec.training.label_smoothing)

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective."""
        flat = batches.flat(rows, sequences)
        labels = np.concatenate([rows.labels_of(row) for row in flat.rows]).astype(np.int64)
        at = np.flatnonzero(labels >= 0)
        counts, notes = [int(rows.targets[row]) for row in flat.rows], [rows.note(row) for row in flat.rows]
        return flat.on(device, at, labels[at], counts, notes=notes)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        weights = None if self._weights is None else self._weights.to(batch.targets.device)
        logits = self.logits(model, batch)
        return F.cross_entropy(logits, batch.targets, weights, reduction="sum", label_smoothing=self._smoothing)

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(into, Entities)
        logits = self.logits(model, batch)
        into.add(F.cross_entropy(logits, batch.targets, reduction="sum"), len(batch.targets))
        found, given = ([self._names[i] for i in tags.tolist()] for tags in (logits.argmax(dim=-1), batch.targets))
        start = 0
        for count, unseen in zip(batch.targets_of_rows, batch.notes, strict=True):
            into.add_tags(found[start : start + count], given[start : start + count], unseen)
            start += count

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return Entities()

    def guess(self, rows: RowSet, train: NDArray[np.int64]) -> Guess | None:
        """See Objective: the tag that most words have."""
        shares = log_shares(label_counts(rows, train))
        usual = self._names[int(shares.argmax())]

        def measured(ids: NDArray[np.int64]) -> Accumulator:
            found = Entities()
            for row in ids:
                labels = rows.labels_of(row)
                tags = torch.from_numpy(labels[labels != NOTHING].astype(np.int64))
                found.add(-shares[tags].sum(), len(tags))
                found.add_tags([usual] * len(tags), [self._names[tag] for tag in tags.tolist()], rows.note(row))
            return found

        return measured

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """(words, tags), fp32."""
        return self._anatomy.tag_logits(model.inner, model.hidden(batch)).float()


def entities(tags: Sequence[str]) -> Iterable[Entity]:
    """Entities of a text's tags: B-TYPE begins one, I-TYPE goes on with it, and begins one where none of its type is open (IOB1 and IOB2).

    Tags without a prefix, as of parts of speech, are entities of one word each; O is none.
    """
    open_type, start = "", 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, dash, kind = tag.partition("-")
        inside = dash and prefix in ("B", "I")
        if open_type and not (inside and prefix == "I" and kind == open_type):
            yield open_type, start, at - 1
            open_type = ""
        if inside and not open_type:
            open_type, start = kind, at
        elif not inside and tag != "O":
            yield tag, at, at
