"""Micro-batches: the rows of some sequences, behind each other, on the device. Called by objectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """(predictions): where in tokens hidden states are needed."""
    targets: Tensor
    """What to predict; its shape is the objective's."""
    targets_of_rows: Sequence[int] = ()
    """Targets of each row, where an objective needs to know."""
    types: Tensor | None = None
    """(1, tokens): 0 in the first part of a row and 1 in the second, for models that tell them apart."""
    notes: Sequence[Any] = ()
    """For each row what evaluation needs besides."""
    splits: Sequence[int] = ()
    """For each row where its second part begins, for models that read the first and write the second."""


@dataclass(frozen=True)
class Flat:
    """Rows behind each other, on the host."""

    rows: NDArray[np.int64]
    """Ids."""
    spans: list[tuple[int, int]]
    """Where each is in the prepared set."""
    tokens: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.array([end - start for start, end in self.spans])

    def on(
        self,
        device: torch.device,
        predict_at: NDArray[np.int64],
        targets: NDArray[Any],
        targets_of_rows: Sequence[int] = (),
        *,
        types: NDArray[np.int64] | None = None,
        notes: Sequence[Any] = (),
        splits: Sequence[int] = (),
    ) -> Batch:
        """The batch on a device. See there."""
        lengths = self.lengths.tolist()
        return Batch(
            tokens=_on(self.tokens, device)[None],
            positions=_on(np.concatenate([np.arange(length) for length in lengths]), device)[None],
            documents=Documents.of(lengths, device),
            predict_at=_on(predict_at, device),
            targets=_on(targets, device),
            targets_of_rows=targets_of_rows,
            types=None if types is None else _on(types, device)[None],
            notes=notes,
            splits=splits,
        )


def flat(rows: RowSet, sequences: Sequence[Rows]) -> Flat:
    """The rows of these sequences."""
    ids = np.concatenate(sequences)
    spans = [(int(rows.offsets[i]), int(rows.offsets[i + 1])) for i in ids]
    return Flat(ids, spans, np.concatenate([rows.tokens[start:end] for start, end in spans]).astype(np.int64))


def _on(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
