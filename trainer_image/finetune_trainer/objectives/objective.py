"""What the loop and the evaluation ask of any objective.

Losses and metrics are sums and counts, so that they do not depend on how rows are batched, packed or spread over ranks. An objective
computes, for one micro-batch, the sum of its loss; train divides by the targets of the whole step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.batches import Batch, ImageBatch
from ..data.order import Step
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
        """By name; eval_loss among them where a loss says how good a model is."""


class Objective(ABC):
    """One way to train."""

    def begin(self, model: Model, rows: RowSet, size: int, ranks: Ranks, stopping: Callable[[], bool]) -> None:  # noqa: B027  # most need nothing
        """Before the first step of a job, with the model as it was: takes down what must be known of that later.

        Args:
            model: not trained yet.
            rows: the prepared set.
            size: rows in one forward pass.
            ranks: who shares the work.
            stopping: whether this rank was asked to stop; asked between batches.

        Raises:
            Stopped: some rank was.
        """

    def files(self) -> dict[str, bytes]:
        """What `begin` took down, for checkpoints."""
        return {}

    def restore(self, files: dict[str, bytes]) -> None:  # noqa: B027  # most need nothing
        """Takes over what a checkpoint of the job held, in place of `begin`."""

    def may_stop(self, step: int) -> bool:
        """Whether a run can be saved with so many steps done, and resume there as if it had never been away."""
        return True

    def begin_step(  # noqa: B027  # most need nothing
        self, model: Model, rows: RowSet, step: Step, own: Sequence[Step], ranks: Ranks, number: int = 0
    ) -> None:
        """Before the losses of a step: what they need to know of it as a whole.

        Args:
            model: as it is.
            rows: the prepared set.
            step: the sequences of all ranks.
            own: micro-batches of this rank.
            ranks: all of them call this.
            number: steps done before.

        Raises:
            Interrupted: some rank was asked to stop before all was done; the step is not begun. On all ranks alike.
        """

    def speeds(self) -> dict[str, float]:
        """Of the step, what differs from run to run, by name: told in status, and in no file."""
        return {}

    def told(self) -> dict[str, float]:
        """What the losses since the last call added up besides on this rank, by name; divided by the targets it is told with the loss."""
        return {}

    @abstractmethod
    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch | ImageBatch:
        """The rows of these sequences with what is to be learned of them."""

    def train_batch(
        self, rows: RowSet, sequences: Sequence[Rows], device: torch.device, step: int
    ) -> Batch | ImageBatch:
        """The same for training, where rows may be changed at random: what is drawn is a function of seed, step and row."""
        return self.batch(rows, sequences, device)

    def imagined_batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch | ImageBatch:
        """One of the sizes that training has, before any step is begun: for its memory to be counted."""
        return self.train_batch(rows, sequences, device, 0)

    def imagine_beginning(self, model: Model, rows: RowSet, own: Sequence[Step], device: torch.device) -> None:  # noqa: B027  # most hold less than a loss does
        """Makes what `begin_step` holds at its peak, for that to be counted; nothing is begun."""

    def extent(self, rows: RowSet, ids: NDArray[np.int64]) -> int:
        """What the memory of these rows' loss grows with: tokens that gradients go through, padding included."""
        return int(rows.lengths[ids].sum())

    @abstractmethod
    def loss(self, model: Model, batch: Any) -> Tensor:
        """Sum of the loss over the batch's targets, fp32; how many each row has, the prepared set says."""

    @abstractmethod
    def measure(self, model: Model, batch: Any, into: Accumulator) -> None:
        """Adds the batch to held-out metrics of its own accumulator.

        Raises:
            Interrupted: this rank was asked to stop before all was measured.
        """

    @abstractmethod
    def accumulator(self) -> Accumulator:
        """Held-out metrics of nothing yet."""

    def accumulator_on_the_way(self) -> Accumulator:
        """The same for an evaluation that is to be quick: without what has to be written to be measured."""
        return self.accumulator()

    def guess(self, rows: RowSet, train: NDArray[np.int64]) -> "Guess | None":
        """Measures what always answering alike reaches (see majority); None where no one answer is the obvious one.

        Args:
            rows: the prepared set.
            train: ids of the rows that the answer is to fit.
        """
        return None


Guess = Callable[[NDArray[np.int64]], Accumulator]
"""Metrics of rows by their ids, of all of them on each rank."""
