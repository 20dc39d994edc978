"""What is minimised and measured: for each objective, loss(batch) -> sum, and the same with metrics. Called by train and evaluate.

The sum is over batch.targets; who divides, and by what, is the caller's business: a step's targets are spread over ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import Batch
from .losses import Accumulator, head_loss
from .models import Model


class Objective(Protocol):
    """One way to train."""

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Sum of the loss over the batch's targets, fp32."""
        ...

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """Adds the batch to held-out metrics."""
        ...

    def accumulator(self) -> Accumulator:
        """Held-out metrics of nothing yet."""
        ...


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning: cross-entropy of the next token."""

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        head = model.head
        assert isinstance(head, nn.Linear)
        return head_loss(model.hidden(batch), head, batch.targets)

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        into.add(self.loss(model, batch), len(batch.targets))

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return Accumulator.empty(0)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a row's class, told from its last token, or an encoder's first."""

    classes: int

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        return F.cross_entropy(model.classes(batch), batch.targets, reduction="sum")

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        logits = model.classes(batch)
        into.add(F.cross_entropy(logits, batch.targets, reduction="sum"), len(batch.targets))
        into.add_predictions(logits.argmax(dim=-1), batch.targets)

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return Accumulator.empty(self.classes)
