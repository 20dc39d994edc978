"""Micro-batches: the rows of some sequences, behind each other, on the device. Called by objectives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..modelling.attention import Documents
from .packing import Sequence as Rows
from .prepared import RowSet

_ON_HOST: Final = ("spatial_shapes",)
"""What of images a model asks for as numbers: a GPU would be waited for, once an image."""


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
    rows: NDArray[np.int64] | None = None
    """Their ids, on the host."""
    answers: Tensor | None = None
    """(predictions): which of them are of an answer, where not all are."""


@dataclass(frozen=True)
class ImageBatch:
    """Images; everything on the device, but what a model asks for as numbers."""

    inputs: dict[str, Tensor]
    """(images, ...) each: what the model takes, by the names of its arguments."""
    targets: Tensor
    """(images): classes; or (images, classes): shares of each class in a mixed image."""


@dataclass(frozen=True)
class Flat:
    """Rows, or parts of them, behind each other, on the host."""

    rows: NDArray[np.int64]
    """Ids."""
    spans: list[tuple[int, int]]
    """Where each is in the prepared set, or among tokens that are not of it."""
    tokens: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
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
        answers: NDArray[np.bool_] | None = None,
    ) -> Batch:
        """The batch on a device. See there."""
        lengths = self.lengths.tolist()
        return Batch(
            tokens=on_device(self.tokens, device)[None],
            positions=on_device(np.concatenate([np.arange(length) for length in lengths]), device)[None],
            documents=Documents.of(lengths, device),
            predict_at=on_device(predict_at, device),
            targets=on_device(targets, device),
            targets_of_rows=targets_of_rows,
            types=None if types is None else on_device(types, device)[None],
            notes=notes,
            splits=splits,
            rows=self.rows,
            answers=None if answers is None else on_device(answers, device),
        )


def flat(rows: RowSet, sequences: Sequence[Rows], parts: Sequence[int] | None = None) -> Flat:
    """The rows of these sequences; with `parts`, of each row its first (0) or second (1) part or both, each a document of its own."""
    ids = np.concatenate(sequences)
    spans = []
    for i in ids:
        start, end = int(rows.offsets[i]), int(rows.offsets[i + 1])
        middle = start + int(rows.splits[i])
        spans += [(start, end)] if parts is None else [((start, middle), (middle, end))[part] for part in parts]
    return Flat(ids, spans, np.concatenate([rows.tokens[start:end] for start, end in spans]).astype(np.int64))


def changed(rows: RowSet, ids: NDArray[np.int64], tokens: Sequence[Sequence[int]]) -> Flat:
    """Rows with other tokens than those of the prepared set, which stay where there are no others."""
    found = [
        np.asarray(each, dtype=np.int64) if each else rows.tokens[rows.offsets[i] : rows.offsets[i + 1]]
        for i, each in zip(ids, tokens, strict=True)
    ]
    ends = np.cumsum([len(each) for each in found]).tolist()
    return Flat(ids, list(zip([0, *ends[:-1]], ends, strict=True)), np.concatenate(found).astype(np.int64))


def images(inputs: Mapping[str, Tensor], targets: NDArray[Any], device: torch.device) -> ImageBatch:
    """The batch on a device. See there."""
    there = {name: one if name in _ON_HOST else on_device(one.numpy(), device) for name, one in inputs.items()}
    return ImageBatch(there, on_device(targets, device))


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy there, which the host does not wait for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
