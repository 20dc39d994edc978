"""What is told of a whole text: its class, its classes, or a number. From its last token, or an encoder's first."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finetune_crds.resolved import ResolvedFineTune

from ..data import batches
from ..data.batches import Batch, Flat, ImageBatch
from ..data.holdout import divide
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..data.wording import Wording, check_words
from ..errors import DataError
from ..modelling import anatomy
from ..modelling.models import Model
from .majority import AT_ONCE, label_counts, log_odds, log_shares
from .objective import Accumulator, Guess, Objective


class _WholeText(Objective):
    def __init__(self, spec: ResolvedFineTune, config: Any, rows: RowSet, tokenizer: Any = None) -> None:
        self._anatomy = anatomy.of(config.model_type)
        self._classes = rows.index.classes
        self._wording = _wording(spec, rows, tokenizer)

    @abstractmethod
    def targets(self, labels: list[NDArray[np.float64]]) -> NDArray[Any]:
        """What is to be told of each text, of its labels."""

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch | ImageBatch:
        """See Objective."""
        return self._batch(rows, batches.flat(rows, sequences), device)

    def train_batch(
        self, rows: RowSet, sequences: Sequence[Rows], device: torch.device, step: int
    ) -> Batch | ImageBatch:
        """See Objective."""
        if self._wording is None:
            return self.batch(rows, sequences, device)
        ids = np.concatenate(sequences)
        found = self._wording.tokens([rows.note(row).decode() for row in ids], step, ids.tolist())
        return self._batch(rows, batches.changed(rows, ids, found), device)

    def _batch(self, rows: RowSet, flat: Flat, device: torch.device) -> Batch:
        ends = np.cumsum(flat.lengths)
        at = ends - flat.lengths if self._anatomy.is_encoder else ends - 1
        return flat.on(device, at, self.targets([rows.labels_of(row) for row in flat.rows]))

    def logits(self, model: Model, batch: Any) -> Tensor:
        """(rows, classes), fp32."""
        return self._anatomy.logits(model.inner, model.hidden(batch)).float()

    @abstractmethod
    def guessed(self, rows: RowSet, train: NDArray[np.int64]) -> Tensor:
        """(classes), fp64: the logits, or the number, that fit these rows best if they are the same for each."""

    @abstractmethod
    def add_guesses(self, guessed: Tensor, targets: Tensor, into: Accumulator) -> None:
        """Adds what this guess of some rows, whose targets these are, is worth."""

    def guess(self, rows: RowSet, train: NDArray[np.int64]) -> Guess | None:
        """See Objective."""
        guessed = self.guessed(rows, train)

        def measured(ids: NDArray[np.int64]) -> Accumulator:
            found = self.accumulator()
            for start in range(0, len(ids), AT_ONCE):
                targets = self.targets([rows.labels_of(row) for row in ids[start : start + AT_ONCE]])
                self.add_guesses(guessed, torch.from_numpy(targets), found)
            return found

        return measured


class Confusion(Accumulator):
    """eval_accuracy and macro eval_f1, over classes that occur, of a confusion matrix."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes * classes)
        self._classes = classes

    def add_predictions(self, predicted: Tensor, labels: Tensor) -> None:
        """Adds predictions of classes, both (rows)."""
        cells = (labels * self._classes + predicted).cpu()
        self.sums[2:] += torch.bincount(cells, minlength=self._classes**2).double()

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        confusion = self.sums[2:].view(self._classes, self._classes)
        right, given, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        accuracy = right.sum() / confusion.sum().clamp(min=1)
        return {"eval_loss": self.loss, "eval_accuracy": float(accuracy), "eval_f1": macro_f1(right, given, found)}


class Classes(_WholeText):
    """Cross-entropy of a class, times the weight of the class; eval_loss is without weights."""

    def __init__(self, spec: ResolvedFineTune, config: Any, rows: RowSet, tokenizer: Any = None) -> None:
        super().__init__(spec, config, rows, tokenizer)
        self._weights = class_weights(spec, rows)
        self._smoothing = float(spec.training.label_smoothing)

    def targets(self, labels: list[NDArray[np.float64]]) -> NDArray[Any]:
        """See _WholeText."""
        return np.array([int(row[0]) for row in labels], dtype=np.int64)

    def loss(self, model: Model, batch: Batch | ImageBatch) -> Tensor:
        """See Objective."""
        weights = None if self._weights is None else self._weights.to(batch.targets.device)
        logits = self.logits(model, batch)
        return F.cross_entropy(logits, batch.targets, weights, reduction="sum", label_smoothing=self._smoothing)

    def measure(self, model: Model, batch: Batch | ImageBatch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(into, Confusion)
        logits = self.logits(model, batch)
        into.add(F.cross_entropy(logits, batch.targets, reduction="sum"), len(batch.targets))
        into.add_predictions(logits.argmax(dim=-1), batch.targets)

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return Confusion(len(self._classes))

    def guessed(self, rows: RowSet, train: NDArray[np.int64]) -> Tensor:
        """See _WholeText."""
        return log_shares(label_counts(rows, train))

    def add_guesses(self, guessed: Tensor, targets: Tensor, into: Accumulator) -> None:
        """See _WholeText."""
        assert isinstance(into, Confusion)
        into.add(-guessed[targets].sum(), len(targets))
        into.add_predictions(guessed.argmax().expand(len(targets)), targets)


class _Several(Accumulator):
    def __init__(self, classes: int) -> None:
        super().__init__(2 + 3 * classes)

    def add_predictions(self, predicted: Tensor, labels: Tensor) -> None:
        """Adds predictions, both (rows, classes) and 0 or 1."""
        right = predicted == labels
        self.sums[2] += right.all(dim=1).sum().cpu()
        self.sums[3] += len(labels)
        found = torch.cat([(predicted * labels).sum(0), labels.sum(0), predicted.sum(0)])
        self.sums[4:] += found.double().cpu()

    def metrics(self) -> dict[str, float]:
        """Accuracy: rows with all classes right. F1: the mean over classes that occur."""
        right, given, found = self.sums[4:].view(3, -1)
        accuracy = self.sums[2] / self.sums[3].clamp(min=1)
        return {"eval_loss": self.loss, "eval_accuracy": float(accuracy), "eval_f1": macro_f1(right, given, found)}


class SeveralClasses(_WholeText):
    """Binary cross-entropy of each class, the mean over classes; a class is found where its logit is above 0."""

    def __init__(self, spec: ResolvedFineTune, config: Any, rows: RowSet, tokenizer: Any = None) -> None:
        super().__init__(spec, config, rows, tokenizer)
        self._weights = class_weights(spec, rows)

    def targets(self, labels: list[NDArray[np.float64]]) -> NDArray[Any]:
        """See _WholeText."""
        found = np.zeros((len(labels), len(self._classes)), dtype=np.float32)
        for row, classes in zip(found, labels, strict=True):
            row[classes.astype(np.int64)] = 1
        return found

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        weights = None if self._weights is None else self._weights.to(batch.targets.device)
        return self._loss(self.logits(model, batch), batch, weights)

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(into, _Several)
        logits = self.logits(model, batch)
        into.add(self._loss(logits, batch, None), len(batch.targets))
        into.add_predictions((logits > 0).float(), batch.targets)

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return _Several(len(self._classes))

    def guessed(self, rows: RowSet, train: NDArray[np.int64]) -> Tensor:
        """See _WholeText."""
        return log_odds(label_counts(rows, train), len(train))

    def add_guesses(self, guessed: Tensor, targets: Tensor, into: Accumulator) -> None:
        """See _WholeText."""
        assert isinstance(into, _Several)
        logits = guessed.expand(len(targets), -1)
        each = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="sum")
        into.add(each / len(self._classes), len(targets))
        into.add_predictions((logits > 0).float(), targets)

    def _loss(self, logits: Tensor, batch: Batch, weights: Tensor | None) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits, batch.targets, weights, reduction="sum")
        return each / len(self._classes)


class _Fit(Accumulator):
    def __init__(self) -> None:
        super().__init__(5)

    def add_predictions(self, predicted: Tensor, numbers: Tensor) -> None:
        """Adds predictions, both (rows)."""
        x, y = predicted.double().cpu(), numbers.double().cpu()
        self.sums[2:] += torch.stack([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])

    def metrics(self) -> dict[str, float]:
        """eval_mse, and Pearson's correlation (0 where either does not vary)."""
        count = self.sums[1].clamp(min=1)
        x, y, xx, yy, xy = self.sums[2:] / count
        spread = ((xx - x * x).clamp(min=0) * (yy - y * y).clamp(min=0)).sqrt()
        pearson = float((xy - x * y) / spread) if spread > 0 else 0.0
        return {"eval_loss": self.loss, "eval_mse": self.loss, "eval_pearson": pearson}


class Numbers(_WholeText):
    """Squared error of a number."""

    def targets(self, labels: list[NDArray[np.float64]]) -> NDArray[Any]:
        """See _WholeText."""
        return np.array([row[0] for row in labels], dtype=np.float32)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        return F.mse_loss(self.logits(model, batch)[:, 0], batch.targets, reduction="sum")

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(into, _Fit)
        found = self.logits(model, batch)[:, 0]
        into.add(F.mse_loss(found, batch.targets, reduction="sum"), len(batch.targets))
        into.add_predictions(found, batch.targets)

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return _Fit()

    def guessed(self, rows: RowSet, train: NDArray[np.int64]) -> Tensor:
        """See _WholeText."""
        return torch.tensor([np.mean([rows.labels_of(row)[0] for row in train])])

    def add_guesses(self, guessed: Tensor, targets: Tensor, into: Accumulator) -> None:
        """See _WholeText. To what never varies there is no correlation, which rounding must not make up."""
        assert isinstance(into, _Fit)
        into.add(((guessed - targets.double()) ** 2).sum(), len(targets))
        into.add_predictions(torch.zeros(len(targets)), targets)


def _wording(spec: ResolvedFineTune, rows: RowSet, tokenizer: Any) -> Wording | None:
    """What changes training texts, if anything does."""
    augmentation = spec.dataset.augmentation
    if augmentation is None or tokenizer is None:
        return None
    synonyms = rows.index.synonyms
    check_words((rows.note(row).decode() for row in divide(spec, rows).train), augmentation, synonyms)
    assert spec.training.sequence_length, "setup decides it"
    return Wording(tokenizer, spec.training.sequence_length, spec.training.seed, augmentation, synonyms)


def class_weights(spec: ResolvedFineTune, rows: RowSet) -> Tensor | None:
    """(classes): weights in the loss, or None if all are 1.

    Balanced ones are n / (k n_c) for n labels of k classes, n_c of them of class c, of the rows that are trained on (King and Zeng 2001).

    Raises:
        DataError: a weight is given for a class that no row has.
    """
    chosen = spec.objective and spec.objective.classification
    names = rows.index.classes
    if chosen and chosen.class_weights:
        unknown = sorted(set(chosen.class_weights) - set(names))
        if unknown:
            raise DataError(
                f"objective.classification.classWeights: no row is of class {unknown[0]!r}; the classes are {', '.join(names[:16])}"
            )
        return torch.tensor([float(chosen.class_weights.get(name, 1)) for name in names])
    if not (chosen and chosen.balance_classes):
        return None
    labels = np.concatenate([rows.labels_of(row) for row in divide(spec, rows).train])
    counts = np.bincount(labels[labels >= 0].astype(np.int64), minlength=len(names)).clip(min=1)
    return torch.from_numpy(counts.sum() / (len(names) * counts)).float()


def macro_f1(right: Tensor, given: Tensor, found: Tensor) -> float:
    """Mean over classes that occur of 2 right / (given + found), all (classes)."""
    occurs = (given + found) > 0
    return float((2 * right / (given + found).clamp(min=1))[occurs].mean()) if occurs.any() else 0.0
