"""Reward models: a score of a conversation, learned from pairs of answers (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finetune_crds.resolved import ResolvedReward

from ..data import batches
from ..data.batches import Batch
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..modelling import anatomy
from ..modelling.models import Model
from .preference import Pairwise
from .reference import BOTH


class Reward(Pairwise):
    """A sequence's score is told from its last token, as transformers' classifiers do."""

    def __init__(self, settings: ResolvedReward, config: Any) -> None:
        super().__init__()
        self._centering = float(settings.centering)
        self._anatomy = anatomy.of(config.model_type)
        self._pad: int = config.pad_token_id

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective. Targets are the margins."""
        flat = batches.flat(rows, sequences, BOTH)
        starts = np.cumsum(flat.lengths) - flat.lengths
        last = [self._last(rows.tokens[start:end]) for start, end in flat.spans]
        margins = np.array([rows.labels_of(row)[0] for row in flat.rows], dtype=np.float32)
        return flat.on(device, starts + last, margins)

    def losses(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Pairwise. Rewards are the scores."""
        scores = self._anatomy.logits(model.inner, model.hidden(batch)).float().view(-1, 2)
        each = -F.logsigmoid(scores[:, 0] - scores[:, 1] - batch.targets)
        return each + self._centering * scores.sum(dim=1).square(), scores

    def _last(self, tokens: NDArray[np.int32]) -> int:
        """The last token that is not padding: where a tokenizer pads with its end of text, that is none to transformers either."""
        kept = np.flatnonzero(tokens != self._pad)
        return int(kept[-1]) if len(kept) else len(tokens) - 1
