"""Whether prompting would have done: the model before training with examples in its prompt, beside the result. Called by train.

What the model before training says is taken down before the first step, whatever the method, and kept in checkpoints, so that a resumed
run compares with the same numbers. Losses are sums over the tokens of each row's answer, so differences are told row by row.
"""

import json
import logging
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from finetune_crds import support
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1.status import FewShotStatus

from .data import packing
from .data.few_shot import PLAIN, PROMPTED, QUESTION
from .data.order import share
from .data.prepared import RowSet
from .errors import Stopped
from .modelling import samples
from .modelling.models import Model, inference
from .objectives import reference
from .ranks import Ranks

FILE: Final = "few-shot.json"
"""In a checkpoint."""

log = logging.getLogger("finetune.prompting")


class Taken(BaseModel):
    """What was taken down before training. Losses are sums over each row's answer, in nats."""

    examples: int
    targets: list[int]
    """Tokens of each row's answer."""
    before: list[float]
    prompted: list[float]
    answers: list[str | None]
    """To evaluation.prompts; None for a prompt that no example leaves room for."""


class Compared(BaseModel):
    """Mean losses in nats a token of the same answers."""

    examples: int
    rows: int
    tokens: int
    before: float
    prompted: float
    after: float
    standard_error: float
    """Of prompted minus after, over rows; 0 for a single one."""

    @property
    def gain(self) -> float:
        """By how much tuning is better than prompting."""
        return self.prompted - self.after

    @property
    def sentence(self) -> str:
        """For people. As good is what cannot be told apart: within two standard errors."""
        with_examples = f"{self.examples} example{'s' * (self.examples != 1)}"
        error = 2 * self.standard_error
        rows = f"on {self.rows} held-out row{'s' * (self.rows != 1)}"
        numbers = f"({self.prompted:.3f} against {self.after:.3f} {rows})"
        if abs(self.gain) <= error or self.gain == 0:
            return f"Prompting with {with_examples} is as good as tuning: the difference is {self.gain:.3f} ± {error:.3f} nats a token {numbers}."
        if self.gain < 0:
            return f"Prompting with {with_examples} is better than tuning by {-self.gain:.3f} ± {error:.3f} nats a token {numbers}."
        return f"Tuning is better than prompting with {with_examples} by {self.gain:.3f} ± {error:.3f} nats a token {numbers}."

    def status(self) -> FewShotStatus:
        """As status tells it."""
        return FewShotStatus(
            examples=self.examples,
            rows=self.rows,
            before=f"{self.before:.6g}",
            prompted=f"{self.prompted:.6g}",
            after=f"{self.after:.6g}",
        )


class Prompting:
    """One job's comparison. Without rows there is none, and nothing happens."""

    def __init__(self, spec: ResolvedFineTune, rows: RowSet | None, tokenizer: Any, size: int) -> None:
        """
        Args:
            spec: the resolved job.
            rows: of few_shot.prepare.
            tokenizer: the model's.
            size: rows in one forward pass.
        """
        self._spec, self._rows, self._tokenizer, self._size = spec, rows, tokenizer, size
        self.taken: Taken | None = None

    def begin(self, model: Model, ranks: Ranks, stopping: Callable[[], bool]) -> None:
        """Before the first step: takes down what the model says, without what it is given to train.

        Raises:
            Stopped: some rank was asked to stop.
        """
        rows = self._rows
        if rows is None:
            return
        log.info("asking the model before training, with examples in its prompt")
        kinds = {kind: np.flatnonzero(rows.sources == kind) for kind in (PLAIN, PROMPTED, QUESTION)}
        losses = [self._losses(model, kinds[kind], ranks, stopping) for kind in (PLAIN, PROMPTED)]
        answers = ranks.once(lambda: [self._answer(model, row, ranks) for row in kinds[QUESTION].tolist()])
        self.taken = Taken(
            examples=int(rows.numbers.max(initial=0)),
            targets=rows.targets[kinds[PLAIN]].tolist(),
            before=losses[0].tolist(),
            prompted=losses[1].tolist(),
            answers=answers,
        )

    def compare(self, model: Model, ranks: Ranks, stopping: Callable[[], bool]) -> Compared | None:
        """The result on the same answers; None where no row was measured.

        Raises:
            Stopped: some rank was asked to stop.
        """
        if self._rows is None or self.taken is None or not self.taken.targets:
            return None
        after = self._losses(model, np.flatnonzero(self._rows.sources == PLAIN), ranks, stopping)
        taken, targets = self.taken, np.array(self.taken.targets)
        tokens, count = int(targets.sum()), len(targets)
        differences = np.array(taken.prompted) - after
        # Of a ratio of sums over rows (Cochran 1977, chapter 6).
        rest = differences - differences.sum() / tokens * targets
        error = np.sqrt(count / (count - 1) * (rest**2).sum()) / tokens if count > 1 else 0.0
        return Compared(
            examples=taken.examples,
            rows=count,
            tokens=tokens,
            before=sum(taken.before) / tokens,
            prompted=sum(taken.prompted) / tokens,
            after=float(after.sum()) / tokens,
            standard_error=float(error),
        )

    def files(self) -> dict[str, bytes]:
        """What `begin` took down, for checkpoints."""
        return {} if self.taken is None else {FILE: self.taken.model_dump_json().encode()}

    def restore(self, files: dict[str, bytes]) -> None:
        """Takes over what a checkpoint held, in place of `begin`."""
        self.taken = Taken.model_validate(json.loads(files[FILE])) if FILE in files else None

    def _losses(
        self, model: Model, ids: NDArray[np.int64], ranks: Ranks, stopping: Callable[[], bool]
    ) -> NDArray[np.float64]:
        """(rows): sums over the tokens of each answer."""
        assert self._rows is not None
        found = torch.zeros(len(ids), dtype=torch.float64)
        place = {int(row): i for i, row in enumerate(ids)}
        stopped = False
        with inference(model):
            for own in share(packing.singly(ids), ranks.rank, ranks.world, size=self._size, forwards=None):
                if stopped := stopping():
                    break
                batch = reference.answers_batch(self._rows, own, (0,), ranks.device)
                at = [place[int(row)] for sequence in own for row in sequence]
                found[at] = -reference.log_probabilities(model, batch).double().cpu()
        if ranks.any(stopped):
            raise Stopped("stopped while the model was asked what prompting gives")
        ranks.sum_(found)
        return found.numpy()

    def _answer(self, model: Model, row: int, ranks: Ranks) -> str | None:
        assert self._rows is not None
        tokens = self._rows.tokens[self._rows.offsets[row] : self._rows.offsets[row + 1]].tolist()
        if not tokens:
            return None
        most = self._spec.evaluation.max_new_tokens
        pairs = self._spec.task in support.PAIRS
        with inference(model):
            if pairs:
                source = torch.tensor(tokens, device=ranks.device)
                (text,) = samples.write(model, self._tokenizer, [source], most)
            else:
                text = samples.say(model, self._tokenizer, tokens, most, ranks.device)
        return text
