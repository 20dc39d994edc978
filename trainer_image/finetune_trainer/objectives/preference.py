"""Pairs of a better and a worse answer: DPO with its losses, ORPO, and what reward models share with them.

A loss is a mean over pairs. Rewards and their margins are what DPO calls so: beta times how much likelier an answer has become.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_crds.resolved import ResolvedDpo, ResolvedOrpo

from ..data import batches
from ..data.batches import Batch
from ..data.order import Step
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..modelling.models import Model
from ..ranks import Ranks
from .objective import Accumulator, Objective
from .reference import (
    BOTH,
    Reference,
    after_first,
    answers_batch,
    log_probabilities,
    sums_of_answers,
    token_log_probabilities,
)


class Comparisons(Accumulator):
    """eval_accuracy: pairs whose better answer has the higher reward. eval_margin: by how much, in the mean."""

    def __init__(self, more: int = 0) -> None:
        super().__init__(2 + more)

    def add_rewards(self, rewards: Tensor) -> None:
        """Adds pairs. rewards: (pairs, 2)."""
        self.sums[2:4] += _compared(rewards).cpu()

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        right, margin = (self.sums[2:4] / self.sums[1].clamp(min=1)).tolist()
        return {"eval_loss": self.loss, "eval_accuracy": right, "eval_margin": margin}


def _compared(rewards: Tensor) -> Tensor:
    """Pairs that are the right way round, and the sum of margins, fp64. rewards: (pairs, 2)."""
    margins = (rewards[:, 0] - rewards[:, 1]).detach().double()
    return torch.stack([(margins > 0).double().sum(), margins.sum()])


class Pairwise(Objective):
    """What objectives over pairs have in common."""

    def __init__(self) -> None:
        self._step: list[Tensor] = []
        """Of each micro-batch, on the device: the host does not wait for them."""

    @abstractmethod
    def losses(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of each pair, (pairs), and both rewards, (pairs, 2); fp32."""

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective."""
        return answers_batch(rows, sequences, BOTH, device)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        each, rewards = self.losses(model, batch)
        self._step.append(_compared(rewards))
        return each.sum()

    def told(self) -> dict[str, float]:
        """See Objective."""
        right, margin = torch.stack(self._step).sum(0).tolist() if self._step else (0.0, 0.0)
        self._step.clear()
        return {"accuracy": right, "margin": margin}

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(into, Comparisons)
        each, rewards = self.losses(model, batch)
        into.add(each.sum(), len(each))
        into.add_rewards(rewards)

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return Comparisons()


class Dpo(Pairwise):
    """Rafailov et al. 2023, eq. 7; IPO: Azar et al. 2023, eq. 17; hinge: Zhao et al. 2023, as in RSO (Liu et al. 2023)."""

    def __init__(self, settings: ResolvedDpo, reference: Reference) -> None:
        super().__init__()
        self._kind = settings.loss
        self._beta = float(settings.beta)
        self._smoothing = float(settings.label_smoothing)
        self._reference = reference

    def begin(self, model: Model, rows: RowSet, size: int, ranks: Ranks, stopping: Callable[[], bool]) -> None:
        """See Objective."""
        self._reference.begin(model, rows, size, ranks, stopping)

    def files(self) -> dict[str, bytes]:
        """See Objective."""
        return self._reference.files()

    def restore(self, files: dict[str, bytes]) -> None:
        """See Objective."""
        self._reference.restore(files)

    def losses(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Pairwise."""
        reference = self._reference.log_probabilities(model, batch, BOTH)
        gains = (log_probabilities(model, batch) - reference).view(-1, 2)
        rewards = self._beta * gains
        margins = rewards[:, 0] - rewards[:, 1]
        match self._kind:
            case "sigmoid":  # with smoothing conservative DPO: Mitchell 2023, eq. 3
                wrong = self._smoothing
                each = -(1 - wrong) * F.logsigmoid(margins) - wrong * F.logsigmoid(-margins)
            case "hinge":
                each = torch.relu(1 - margins)
            case "ipo":  # of the mean over an answer's tokens, as its authors did, says TRL
                means = gains / torch.tensor(batch.targets_of_rows, device=gains.device).view(-1, 2)
                each = (means[:, 0] - means[:, 1] - 1 / (2 * self._beta)).square()
        return each, rewards


class Orpo(Pairwise):
    """Hong et al. 2024, eq. 6 and 7: cross-entropy of the better answer with its prompt, and the odds ratio of both answers.

    The former is a mean over the step's tokens, the latter over its pairs, as in TRL.
    """

    def __init__(self, settings: ResolvedOrpo) -> None:
        super().__init__()
        self._beta = float(settings.beta)
        self._tokens_of_a_pair = 1.0
        """In the mean over the step."""

    def begin_step(
        self, model: Model, rows: RowSet, step: Step, own: Sequence[Step], ranks: Ranks, number: int = 0
    ) -> None:
        """See Objective."""
        self._tokens_of_a_pair = float((rows.splits[np.concatenate(step)] - 1).mean())

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective. Predicts all tokens of the better sequence, and the answer of the worse."""
        flat = batches.flat(rows, sequences, BOTH)
        learned = [after_first(rows.learned[start:end]) for start, end in flat.spans]
        wanted = [after_first(np.ones_like(one)) if i % 2 == 0 else one for i, one in enumerate(learned)]
        at = np.flatnonzero(np.concatenate(wanted))
        answers = np.concatenate(learned)[at]
        counts = [int(one.sum()) for one in wanted]
        return flat.on(device, at - 1, flat.tokens[at], counts, answers=answers)

    def losses(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Pairwise. Rewards are beta times an answer's mean log-probability."""
        texts, odds, rewards = self._terms(model, batch)
        return texts / self._tokens_of_a_pair + odds, rewards

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        assert isinstance(into, _Odds)
        texts, odds, rewards = self._terms(model, batch)
        into.add(odds.sum(), len(odds))
        into.add_rewards(rewards)
        into.add_texts(texts.sum(), sum(batch.targets_of_rows[::2]))

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return _Odds()

    def _terms(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of each better sequence, (pairs), loss of the odds ratio, (pairs), and rewards, (pairs, 2)."""
        assert batch.answers is not None
        each = token_log_probabilities(model, batch)
        texts = -sums_of_answers(each, batch.targets_of_rows).view(-1, 2)[:, 0]
        answers = batch.answers.float()
        means = sums_of_answers(each * answers, batch.targets_of_rows) / sums_of_answers(answers, batch.targets_of_rows)
        log_odds = (means - _log_of_rest(means)).view(-1, 2)
        return texts, -self._beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1]), self._beta * means.view(-1, 2)


class _Odds(Comparisons):
    def __init__(self) -> None:
        super().__init__(2)

    def add_texts(self, loss: Tensor, tokens: int) -> None:
        """Adds cross-entropy of better sequences."""
        self.sums[4] += loss.double().cpu()
        self.sums[5] += tokens

    @property
    def loss(self) -> float:
        """Mean over tokens of the one part, over pairs of the other."""
        return super().loss + float(self.sums[4] / self.sums[5].clamp(min=1))


def _log_of_rest(log_probability: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012)."""
    near = log_probability > -0.6931
    one = torch.log(-torch.expm1(torch.where(near, log_probability, -1.0)))
    other = torch.log1p(-torch.exp(torch.where(near, -1.0, log_probability)))
    return torch.where(near, one, other)
