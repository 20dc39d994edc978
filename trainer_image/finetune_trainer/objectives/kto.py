"""Single answers, each good or bad: Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 7 and 8).

An answer's value is measured from z0, an estimate of how far the model has moved from the reference: the mean gain in log-probability of
answers to other rows' prompts, over the whole step and all ranks, and never below 0. No gradient goes through it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_crds.resolved import ResolvedKto

from ..data.batches import Batch
from ..data.order import Step
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..modelling.models import Model, inference
from ..ranks import Ranks
from .objective import Accumulator, Objective
from .reference import Reference, answers_batch, log_probabilities

OWN, OTHER = (0,), (1,)
"""Parts of a row: the prompt with its own answer, and with that of another row."""


@dataclass(frozen=True, kw_only=True)
class _Answers(Batch):
    """Rows' own answers."""

    others: Batch
    """The same prompts with answers to others."""
    good: Tensor
    """(rows): 1 for a good answer, 0 for a bad one."""


class Kto(Objective):
    """Loss of each answer: its weight times 1 - sigmoid(beta (gain - z0)), for a bad one with the sign turned."""

    def __init__(self, settings: ResolvedKto, reference: Reference) -> None:
        self._beta = float(settings.beta)
        self._weights = (float(settings.desirable_weight), float(settings.undesirable_weight))
        self._reference = reference
        self._moved = 0.0
        """z0 of the step."""

    def begin(self, model: Model, rows: RowSet, size: int, ranks: Ranks, stopping: Callable[[], bool]) -> None:
        """See Objective."""
        self._reference.begin(model, rows, size, ranks, stopping)

    def files(self) -> dict[str, bytes]:
        """See Objective."""
        return self._reference.files()

    def restore(self, files: dict[str, bytes]) -> None:
        """See Objective."""
        self._reference.restore(files)

    def begin_step(
        self, model: Model, rows: RowSet, step: Step, own: Sequence[Step], ranks: Ranks, number: int = 0
    ) -> None:
        """See Objective. Without dropout: it is an estimate of the model, not of what one draw of dropout makes of it."""
        gains = [torch.zeros((), dtype=torch.float64, device=ranks.device)]
        with inference(model):
            for sequences in own:
                batch = answers_batch(rows, sequences, OTHER, ranks.device)
                gains.append(self._gains(model, batch, OTHER).double().sum())
        (total,) = ranks.sums([torch.stack(gains).sum().item()])
        self._moved = max(0.0, total / sum(map(len, step)))

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective."""
        own, others = (answers_batch(rows, sequences, part, device) for part in (OWN, OTHER))
        assert own.rows is not None
        good = torch.tensor([rows.labels_of(int(row))[0] for row in own.rows], dtype=torch.float32, device=device)
        return _Answers(**vars(own), others=others, good=good)

    def extent(self, rows: RowSet, ids: NDArray[np.int64]) -> int:
        """See Objective. Through answers to other rows no gradient goes."""
        return int(rows.splits[ids].sum())

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        assert isinstance(batch, _Answers)
        return self.losses(self._gains(model, batch, OWN), batch.good, self._moved).sum()

    def losses(self, gains: Tensor, good: Tensor, moved: float) -> Tensor:
        """(rows). Args: gains (rows): in log-probability; good (rows): 1 or 0; moved: z0."""
        values = 1 - torch.sigmoid(self._beta * (2 * good - 1) * (gains - moved))
        return torch.where(good > 0, self._weights[0], self._weights[1]) * values

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(batch, _Answers) and isinstance(into, _Gains)
        gains = [self._gains(model, batch, OWN), self._gains(model, batch.others, OTHER), batch.good]
        into.add_rows(torch.stack(gains, dim=1))

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return _Gains(self)

    @property
    def beta(self) -> float:
        """A reward is beta times the gain."""
        return self._beta

    def _gains(self, model: Model, batch: Batch, parts: Sequence[int]) -> Tensor:
        """(rows): how much likelier each answer is than before training, in nats."""
        reference = self._reference.log_probabilities(model, batch, parts)
        return log_probabilities(model, batch) - reference


class _Gains(Accumulator):
    """eval_loss, with z0 of all held-out rows; eval_margin: mean reward of good answers less that of bad ones."""

    def __init__(self, objective: Kto) -> None:
        super().__init__(0)
        self._objective = objective
        self._rows: list[Tensor] = []

    def add_rows(self, rows: Tensor) -> None:
        """Adds rows: the gain of the own answer, that of another, and whether the own one is good. rows: (rows, 3)."""
        self._rows.append(rows.double().cpu())

    def merge(self, other: Accumulator) -> None:
        """See Accumulator."""
        assert isinstance(other, _Gains)
        self._rows += other._rows

    def join(self, ranks: Ranks) -> None:
        """See Accumulator."""
        self._rows = [rows for own in ranks.gather(self._rows) for rows in own]

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        own, other, good = torch.cat(self._rows).unbind(dim=1)
        moved = max(0.0, float(other.mean()))
        loss = self._objective.losses(own, good, moved).mean()
        means = [float(own[chosen].mean()) if chosen.any() else 0.0 for chosen in (good > 0, good == 0)]
        return {"eval_loss": float(loss), "eval_margin": self._objective.beta * (means[0] - means[1])}
