"""Micro-batches: the rows of some sequences, behind each other, on the device. Called by train and evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..modelling.attention import Documents
from .packing import Sequence as Rows
from .prepared import RowSet


@dataclass(frozen=True)
class Batch:
    """Rows without padding; everything on the device."""

    tokens: Tensor
    """(1, tokens)."""
    positions: Tensor
    """(1, tokens); they start at 0 in each row."""
    documents: Documents
    """Where rows end."""
    predict_at: Tensor
    """(targets): where in tokens each target is predicted from. For classes: each row's last token."""
    targets: Tensor
    """(targets): token or class to predict."""


def make(rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
    """The batch of these sequences."""
    ids = np.concatenate(sequences)
    spans = [(int(rows.offsets[i]), int(rows.offsets[i + 1])) for i in ids]
    lengths = [end - start for start, end in spans]
    tokens = np.concatenate([rows.tokens[start:end] for start, end in spans]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    if rows.index.classes:
        predict_at = np.cumsum(lengths) - 1
        targets = rows.labels[ids].astype(np.int64)
    else:
        learned = np.concatenate([_after_first(rows.learned[start:end]) for start, end in spans])
        at = np.flatnonzero(learned)
        predict_at, targets = at - 1, tokens[at]
    return Batch(
        tokens=_on(tokens, device)[None],
        positions=_on(positions, device)[None],
        documents=Documents.of(lengths, device),
        predict_at=_on(predict_at, device),
        targets=_on(targets, device),
    )


def target_counts(rows: RowSet) -> NDArray[np.int64]:
    """Targets of every row of the set: learned tokens, or its one class."""
    if rows.index.classes:
        return np.ones(len(rows.targets), dtype=np.int64)
    return np.asarray(rows.targets, dtype=np.int64)


def _after_first(learned: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A row's first token has nothing before it in the row to be told from."""
    copy = np.array(learned)
    copy[:1] = False
    return copy


def _on(array: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
