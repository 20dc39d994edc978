"""What the loop and the evaluation ask of any objective.

Losses and metrics are sums and counts, so that they do not depend on how rows are batched, packed or spread over ranks. An objective
computes, for one micro-batch, the sum of its loss; train divides by the targets of the whole step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..modelling.models import Model
from ..ranks import Ranks


class Accumulator(ABC):
    """Held-out metrics."""

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(2 + size, dtype=torch.float64)
        """Loss, targets, then what the objective adds up; ranks add it up too."""

    def add(self, loss: Tensor, count: float) -> None:
        """Adds a micro-batch's loss sum over `count` targets."""
        self.sums[0] += loss.detach().double().cpu()
        self.sums[1] += count

    def merge(self, other: "Accumulator") -> None:
        """Takes in what another of the same kind has seen."""
        self.sums += other.sums

    def join(self, ranks: Ranks) -> None:
        """Takes in what the other ranks have seen."""
        ranks.sum_(self.sums)

    @property
    def loss(self) -> float:
        """Mean over targets."""
        return float(self.sums[0] / self.sums[1].clamp(min=1))

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """By name, eval_loss among them."""


class Objective(ABC):
    """One way to train."""

    @abstractmethod
    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """The rows of these sequences with what is to be learned of them."""

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Sum of the loss over the batch's targets, fp32; how many each row has, the prepared set says."""

    @abstractmethod
    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """Adds the batch to held-out metrics of its own accumulator."""

    @abstractmethod
    def accumulator(self) -> Accumulator:
        """Held-out metrics of nothing yet."""
