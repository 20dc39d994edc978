"""The class of an image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_crds.resolved import ResolvedFineTune

from ..data import batches
from ..data.batches import ImageBatch
from ..data.holdout import divide
from ..data.image_workers import Images
from ..data.packing import Sequence as Rows
from ..data.pixels import Pixels
from ..data.prepared import RowSet
from ..errors import UserError
from ..modelling import anatomy
from ..modelling.models import Model
from .classes import Classes

_MIXED = 1
"""Tells what is drawn for the other image from what is drawn for an image."""


class ImageClasses(Classes):
    """Cross-entropy of an image's class; of two images that are mixed, of the shares of both (Zhang et al. 2018, Yun et al. 2019).

    The other image is any of those that are trained on, drawn anew: were it one of the same batch, as is usual, the result would depend
    on how a step is cut into micro-batches and ranks.
    """

    def __init__(self, spec: ResolvedFineTune, config: Any, rows: RowSet, processor: Any) -> None:
        super().__init__(spec, config, rows)
        self._augmentation = spec.dataset.augmentation
        self.pixels = Pixels(processor, config, spec)
        _check_size(spec, config, self.pixels.size, processor)
        self._train_rows = divide(spec, rows).train

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> ImageBatch:
        """See Objective."""
        ids = np.concatenate(sequences)
        return batches.images(self.pixels.plain([rows.note(row) for row in ids]), self._classes_of(rows, ids), device)

    def train_batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device, step: int) -> ImageBatch:
        """See Objective."""
        if self._augmentation is None:
            return self.batch(rows, sequences, device)
        ids = np.concatenate(sequences)
        inputs = self.pixels.augmented([rows.note(row) for row in ids], step, [(int(row),) for row in ids])
        classes = self._classes_of(rows, ids)
        if self._augmentation.mixup or self._augmentation.cutmix:
            return self._mixed(rows, ids, inputs, classes, device, step)
        return batches.images(inputs, classes, device)

    def extent(self, rows: RowSet, ids: NDArray[np.int64]) -> int:
        """See Objective. Images are of one size."""
        return len(ids)

    def logits(self, model: Model, batch: Any) -> Tensor:
        """(images, classes), fp32."""
        return model.image_logits(batch.inputs).float()

    def _mixed(
        self,
        rows: RowSet,
        ids: NDArray[np.int64],
        inputs: Images,
        classes: NDArray[np.int64],
        device: torch.device,
        step: int,
    ) -> ImageBatch:
        from ..data.augment import rectangle

        assert self._augmentation
        draws = [self.pixels.draw(step, int(row), _MIXED) for row in ids]
        others = np.array([self._train_rows[draw.integers(len(self._train_rows))] for draw in draws])
        keys = [(int(row), _MIXED, int(other)) for row, other in zip(ids, others, strict=True)]
        theirs = self.pixels.augmented([rows.note(row) for row in others], step, keys)[anatomy.PIXELS]
        pixels = inputs[anatomy.PIXELS]
        alpha = float(self._augmentation.mixup or self._augmentation.cutmix or 0)
        kept = np.array([draw.beta(alpha, alpha) for draw in draws])
        for i, draw in enumerate(draws):
            if self._augmentation.mixup:
                pixels[i].mul_(kept[i]).add_(theirs[i], alpha=1 - kept[i])
            else:
                height, width = pixels.shape[-2:]
                y, x = rectangle(height, width, 1 - kept[i], draw)
                pixels[i, :, y, x] = theirs[i, :, y, x]
                kept[i] = 1 - (y.stop - y.start) * (x.stop - x.start) / (height * width)
        names = np.eye(len(rows.index.classes), dtype=np.float32)
        shares = kept[:, None] * names[classes] + (1 - kept)[:, None] * names[self._classes_of(rows, others)]
        return batches.images(inputs, shares.astype(np.float32), device)

    def _classes_of(self, rows: RowSet, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([int(rows.labels_of(row)[0]) for row in ids], dtype=np.int64)


def _check_size(spec: ResolvedFineTune, config: Any, size: tuple[int, int] | None, processor: Any) -> None:
    what, wanted = "images", anatomy.fixed_size(config)
    if size is None:
        what, wanted, size = "patches", *((one.patch_size,) * 2 for one in (anatomy.of_images(config), processor))
    if wanted and size != wanted and not (what == "images" and anatomy.takes_size(config, size)):
        file = getattr(processor, "written_in", "preprocessor_config.json")
        raise UserError(
            f"spec.model: {spec.model.uri} takes {what} of {wanted[0]} x {wanted[1]} and its {file} makes them {size[0]} x {size[1]}; correct it"
        )
