"""What a model reaches that has not read the row: it always gives the answer that fits the training rows best.

The baseline of a head that is new, since what a random one says means nothing. Classes get the shares that they have in training, so that
the majority is predicted and the loss is the cross-entropy to these shares; a number is the mean. As scikit-learn's DummyClassifier
(strategy prior) and DummyRegressor. Called by the objectives of classes, tags and numbers.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.prepared import NOTHING, RowSet

AT_ONCE = 4096
"""Rows of which something is in memory together."""
_UNSEEN = 0.5
"""Rows that a class without any is counted as: it may occur among held-out rows, and a probability of 0 would cost infinitely much."""


def label_counts(rows: RowSet, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """(classes): how often each occurs in these rows."""
    counts = np.zeros(len(rows.index.classes), np.int64)
    for row in ids:
        labels = rows.labels_of(row)
        np.add.at(counts, labels[labels != NOTHING].astype(np.int64), 1)
    return counts


def log_shares(counts: NDArray[Any]) -> Tensor:
    """(classes), fp64: logarithms of the shares of classes that exclude each other."""
    seen = torch.from_numpy(np.maximum(counts, _UNSEEN))
    return torch.log(seen / seen.sum())


def log_odds(counts: NDArray[Any], rows: int) -> Tensor:
    """(classes), fp64: of classes of which a row may have several, how many of `rows` rows have each; above 0: most have it."""
    seen = torch.from_numpy(np.clip(counts, _UNSEEN, max(rows - _UNSEEN, _UNSEEN)).astype(np.float64))
    return torch.log(seen / (rows - seen))
