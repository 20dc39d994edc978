"""Next tokens: supervised fine-tuning, and going on with pretraining."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..data import batches
from ..data.batches import Batch
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..modelling.head_loss import head_loss
from ..modelling.models import Model
from .objective import Accumulator, Objective
from .reference import after_first


class Perplexity(Accumulator):
    """eval_loss in nats a token, and its exponential."""

    def __init__(self) -> None:
        super().__init__(0)

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        loss = self.loss
        return {"eval_loss": loss, "eval_perplexity": math.exp(loss) if loss < 700 else math.inf}


class Sft(Objective):
    """Cross-entropy of the next token, where a row says that it is learned."""

    def __init__(self, smoothing: float = 0.0) -> None:
        """Args: smoothing: part of each target that is spread over the vocabulary in training."""
        self._smoothing = smoothing

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective."""
        flat = batches.flat(rows, sequences)
        learned = np.concatenate([after_first(rows.learned[start:end]) for start, end in flat.spans])
        at = np.flatnonzero(learned)
        return flat.on(device, at - 1, flat.tokens[at])

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        head = model.head
        assert isinstance(head, nn.Linear)
        return head_loss(model.hidden(batch), head, batch.targets, self._smoothing if model.outer.training else 0.0)

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        into.add(self.loss(model, batch), len(batch.targets))

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return Perplexity()
