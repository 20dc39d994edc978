"""Group relative policy optimisation (Shao et al. 2024): the model answers each prompt of a step several times, and is judged.

A row is a prompt with all its answers, the group: it stays on one rank, and losses are sums over groups. Answers are a function of the
weights and of (seed, step, row, number of the answer); what was answered is never saved, so a run is saved only where new answers follow.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune_crds.resolved import ResolvedFineTune, ResolvedGrpo

from ..data import batches
from ..data.batches import Batch, on_device
from ..data.order import Step
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..errors import Interrupted, UserError
from ..methods.method import Method
from ..modelling import generation
from ..modelling.attention import Documents
from ..modelling.generation import Written
from ..modelling.head_loss import head_log_probabilities
from ..modelling.models import Model, inference
from ..ranks import Ranks
from .objective import Accumulator, Objective
from .rewards import Answer, Panel

SCALE_EPSILON = 1e-4
"""Added to standard deviations, as in TRL."""


@dataclass(frozen=True)
class _Judged:
    """An answer to learn from."""

    written: Written
    advantage: float
    before: Tensor | None = None
    """Log-probabilities of its tokens when it was written, on the host; None: those of now."""


@dataclass(frozen=True, kw_only=True)
class _Rollouts(Batch):
    """Prompts with their answers, each a document; targets are the answers' tokens."""

    advantages: Tensor
    """(predictions): that of the answer."""
    weights: Tensor
    """(predictions): in the loss."""
    before: Tensor | None
    """(predictions): log-probabilities when the answers were written."""


class Grpo(Objective):
    """The clipped surrogate of PPO over answers' tokens, with advantages from the group, and a KL divergence if asked for."""

    def __init__(
        self, spec: ResolvedFineTune, method: Method, tokenizer: Any, panel: Panel, stopping: Callable[[], bool]
    ) -> None:
        """
        Args:
            spec: the job.
            method: which weights are trained.
            tokenizer: of the model.
            panel: the judges.
            stopping: whether this rank was asked to stop.
        """
        assert spec.objective and spec.objective.grpo and spec.objective.grpo.max_completion_length
        self._settings: ResolvedGrpo = spec.objective.grpo
        self._most = spec.objective.grpo.max_completion_length
        self._seed = spec.training.seed
        self._method = method
        self._tokenizer = tokenizer
        self._panel = panel
        self._stopping = stopping
        self._temperature = float(self._settings.temperature)
        self._beta = float(self._settings.beta)
        self._low, self._high = 1 - float(self._settings.epsilon), 1 + float(self._settings.epsilon_high)
        self._groups: dict[int, list[_Judged]] = {}
        """Of this rank, by row."""
        self._of_a_token = 1.0
        """Prompts for each token of an answer, over all ranks: the weight of a token in a mean over tokens."""
        self._generated: dict[str, float] = {}
        """Sums of what `told` tells of the answers."""
        self._speed = 0.0
        self._step: list[Tensor] = []
        """Of each micro-batch the tokens that were clipped and the divergence, on the device."""

    def may_stop(self, step: int) -> bool:
        """See Objective."""
        return step % self._settings.iterations == 0

    def begin_step(
        self, model: Model, rows: RowSet, step: Step, own: Sequence[Step], ranks: Ranks, number: int = 0
    ) -> None:
        """See Objective. New answers, or those of the step before once more. Raises Interrupted, on all ranks if on one."""
        if not self.may_stop(number):
            return
        ids = np.concatenate([np.concatenate(part) for part in own]) if own else np.zeros(0, dtype=np.int64)
        began = time.monotonic()
        keys = answer_keys(self._seed, number, ids, self._settings.generations)
        written: list[list[Written]] | None = None
        with suppress(Interrupted):
            written = self._written(model, [_tokens(rows, int(row)) for row in ids], keys, ranks.device)
        if ranks.any(written is None) or written is None:
            raise Interrupted
        tokens = sum(len(one.tokens) for group in written for one in group)
        seconds = time.monotonic() - began
        scores, problem = self._scores(rows, ids, written)
        totals = self._panel.totals(scores).reshape(len(ids), self._settings.generations)
        judged = [(~np.isnan(totals)).sum(), *(~np.isnan(scores)).sum(axis=0)]
        seen = ranks.gather((tokens, seconds, problem, judged))
        if problem := next(filter(None, (problem for _, _, problem, _ in seen)), None):
            raise UserError(problem)
        prompts, everywhere = sum(map(len, step)), sum(tokens for tokens, *_ in seen)
        self._speed = everywhere / max(1e-9, *(seconds for _, seconds, *_ in seen))
        self._of_a_token = prompts / everywhere
        advantages = self._advantages(totals, ranks)
        self._groups = {
            int(row): [_Judged(one, float(advantage)) for one, advantage in zip(group, those, strict=True)]
            for row, group, those in zip(ids, written, advantages, strict=True)
        }
        self._note(written, totals, scores, np.sum([judged for *_, judged in seen], axis=0) / prompts)
        if self._settings.iterations > 1:
            self._note_before(model, rows, own, ranks.device)

    def told(self) -> dict[str, float]:
        """See Objective. As TRL names them where it has them."""
        clipped, divergence = torch.stack(self._step).sum(0).tolist() if self._step else (0.0, 0.0)
        self._step.clear()
        found = self._generated | {"clip_ratio": clipped * self._of_a_token}
        return found | {"kl": divergence * self._of_a_token} if self._beta else found

    def speeds(self) -> dict[str, float]:
        """See Objective."""
        return {"generated_tokens_per_second": self._speed}

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective. Prompts to answer."""
        flat = batches.flat(rows, sequences)
        nothing = np.zeros(0, dtype=np.int64)
        return flat.on(device, nothing, nothing, notes=[rows.note(int(row)) for row in flat.rows])

    def train_batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device, step: int) -> Batch:
        """See Objective. Prompts with the answers of this step."""
        return self._rollouts(rows, sequences, self._groups, device)

    def imagined_batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective. All answers are as long as they may be."""
        before = torch.zeros(self._most) if self._settings.iterations > 1 else None
        answer = _Judged(Written(np.zeros(self._most, dtype=np.int64), ended=False), 0.0, before)
        groups = {int(row): [answer] * self._settings.generations for row in np.concatenate(sequences)}
        return self._rollouts(rows, sequences, groups, device)

    def imagine_beginning(self, model: Model, rows: RowSet, own: Sequence[Step], device: torch.device) -> None:
        """See Objective. Answers to the longest prompts, as many as are written together."""
        prompts = [_tokens(rows, int(row)) for part in own for row in np.concatenate(part)]
        size, answers = self._together(self._settings.generations)
        longest = sorted(prompts, key=len)[-size:]
        generation.imagine(model, longest, answers, self._most, self._temperature, device)

    def extent(self, rows: RowSet, ids: NDArray[np.int64]) -> int:
        """See Objective. Each answer stands behind its prompt."""
        return self._settings.generations * int((rows.lengths[ids] + self._most).sum())

    def _rollouts(
        self, rows: RowSet, sequences: Sequence[Rows], groups: Mapping[int, list[_Judged]], device: torch.device
    ) -> _Rollouts:
        documents, at, targets, lengths, advantages, weights = [], [], [], [], [], []
        before: list[Tensor] = []
        offset = 0
        for row in np.concatenate(sequences):
            prompt = _tokens(rows, int(row))
            for judged in groups[int(row)]:
                said = judged.written.tokens
                documents.append(np.concatenate([prompt, said]))
                at.append(offset + len(prompt) - 1 + np.arange(len(said)))
                targets.append(said)
                lengths.append(len(said))
                advantages.append(np.full(len(said), judged.advantage, dtype=np.float32))
                weights.append(np.full(len(said), self._weight(len(said)), dtype=np.float32))
                before += [] if judged.before is None else [judged.before]
                offset += len(prompt) + len(said)
        sizes = [len(document) for document in documents]
        return _Rollouts(
            tokens=on_device(np.concatenate(documents), device)[None],
            positions=on_device(np.concatenate([np.arange(size) for size in sizes]), device)[None],
            documents=Documents.of(sizes, device),
            predict_at=on_device(np.concatenate(at), device),
            targets=on_device(np.concatenate(targets), device),
            targets_of_rows=lengths,
            advantages=on_device(np.concatenate(advantages), device),
            weights=on_device(np.concatenate(weights), device),
            before=torch.cat(before).to(device) if before else None,
        )

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        assert isinstance(batch, _Rollouts)
        now = self._log_probabilities(model, batch)
        before = now.detach() if batch.before is None else batch.before
        ratio = torch.exp(now - before)
        surrogate = torch.min(ratio * batch.advantages, ratio.clamp(self._low, self._high) * batch.advantages)
        each = -surrogate
        divergence = torch.zeros_like(ratio)
        if self._beta:
            untouched = self._method.untouched(model)
            assert untouched is not None, "a rule of the schema says so"
            with inference(model), untouched as reference:
                of_reference = self._log_probabilities(reference, batch)
            gain = of_reference - now
            # Schulman's estimator (2020), by the ratio since answers are of the model as it was, as in TRL
            divergence = (torch.exp(gain) - gain - 1) * ratio
            each = each + self._beta * divergence
        with torch.no_grad():
            down = (ratio < self._low) & (batch.advantages < 0)
            up = (ratio > self._high) & (batch.advantages > 0)
            self._step.append(torch.stack([(down | up).double().sum(), divergence.double().sum()]))
        return (each * batch.weights).sum()

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective. Answers are the most likely ones."""
        assert isinstance(into, _Rewards)
        prompts = [part.cpu().numpy() for part in torch.split(batch.tokens[0], list(batch.documents.lengths))]
        written = [one for (one,) in self._written(model, prompts, None, batch.tokens.device)]
        scores = self._panel.scores(self._answers(batch.notes, [[one] for one in written]))
        into.add_answers(self._panel.totals(scores), scores, written)

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return _Rewards(self._panel.names)

    def _written(
        self, model: Model, prompts: Sequence[NDArray[np.int64]], keys: NDArray[np.uint64] | None, device: torch.device
    ) -> list[list[Written]]:
        """Answers to each prompt, those to prompts of like lengths together."""
        ends = generation.ends(model, self._tokenizer)
        answers = 1 if keys is None else keys.shape[1]
        size, part = self._together(answers)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[list[Written]] = [[] for _ in prompts]
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for first in range(0, answers, part):
                own = None if keys is None else keys[chosen, first : first + part]
                together = [prompts[i] for i in chosen]
                written = generation.write(
                    model, together, own, self._most, ends, self._temperature, device, self._stopping
                )
                for i, those in zip(chosen, written, strict=True):
                    found[i] += those
        return found

    def _together(self, answers: int) -> tuple[int, int]:
        """How many prompts, and answers to each, are written at a time. answers: to each prompt."""
        at_a_time = self._settings.generation_batch_size
        return max(1, at_a_time // answers), min(answers, at_a_time)

    def _answers(self, notes: Sequence[bytes], written: Sequence[Sequence[Written]]) -> list[Answer]:
        found = []
        for note, group in zip(notes, written, strict=True):
            row = json.loads(note)
            for one in group:
                text = self._tokenizer.decode(one.tokens, skip_special_tokens=True)
                found.append(Answer(row["asked"], text, one.tokens.tolist(), row["columns"]))
        return found

    def _scores(
        self, rows: RowSet, ids: NDArray[np.int64], written: list[list[Written]]
    ) -> tuple[NDArray[np.float64], str | None]:
        """(answers, rewards), or what is wrong with them, for all ranks to hear."""
        answers = self._answers([rows.note(int(row)) for row in ids], written)
        try:
            return self._panel.scores(answers), None
        except UserError as error:
            return np.zeros((len(answers), len(self._panel.names))), str(error)

    def _advantages(self, totals: NDArray[np.float64], ranks: Ranks) -> NDArray[np.float64]:
        """Args: totals: (groups, answers), NaN where nothing judged an answer, which then teaches nothing."""
        deviation: NDArray[np.float64] = np.ones((1, 1))
        match self._settings.scale_rewards:
            case "group":
                deviation = _spread(totals)[:, None] + SCALE_EPSILON
            case "batch":
                everywhere = np.concatenate([own.reshape(-1) for own in ranks.gather(totals)])
                deviation = _spread(everywhere[None])[:, None] + SCALE_EPSILON
        return np.nan_to_num((totals - _mean(totals)[:, None]) / deviation, nan=0.0)

    def _note(
        self,
        written: list[list[Written]],
        totals: NDArray[np.float64],
        scores: NDArray[np.float64],
        judged: NDArray[np.float64],
    ) -> None:
        """What `told` tells, so that it is a mean over judged answers, all answers or groups once it is divided by the number of prompts.

        Args:
            written: answers of this rank, by prompt.
            totals: (groups, answers).
            scores: (answers, rewards).
            judged: answers for each prompt, over all ranks, that any reward judges, and that each does.
        """
        answers = self._settings.generations
        names = ["reward", *(f"reward_{name}" for name in self._panel.names)]
        sums = [np.nansum(totals), *np.nansum(scores, axis=0)]
        spread = _spread(totals)
        flat = [one for group in written for one in group]
        self._generated = {
            **{name: float(total / those) for name, total, those in zip(names, sums, judged, strict=True) if those},
            "reward_std": float(spread.sum()),
            "frac_reward_zero_std": float(np.isclose(spread, 0).sum()),
            "completion_length": sum(len(one.tokens) for one in flat) / answers,
            "truncated": sum(not one.ended for one in flat) / answers,
        }

    def _note_before(self, model: Model, rows: RowSet, own: Sequence[Step], device: torch.device) -> None:
        """Log-probabilities of the answers by the model that wrote them, in the batches in which it will learn from them."""
        with inference(model):
            for sequences in own:
                batch = self.train_batch(rows, sequences, device, 0)
                parts = iter(torch.split(self._log_probabilities(model, batch).cpu(), list(batch.targets_of_rows)))
                for row in np.concatenate(sequences):
                    self._groups[int(row)] = [replace(judged, before=next(parts)) for judged in self._groups[int(row)]]

    def _log_probabilities(self, model: Model, batch: Batch) -> Tensor:
        """(predictions), fp32, at the temperature that answers were drawn at."""
        head = model.head
        assert isinstance(head, nn.Linear) and head.bias is None
        return head_log_probabilities(model.hidden(batch) / self._temperature, head, batch.targets)

    def _weight(self, length: int) -> float:
        """Of each token of an answer of this length: the step's sum over its prompts is the mean that `loss` says."""
        answers = self._settings.generations
        match self._settings.loss:
            case "dapo":
                return self._of_a_token
            case "grpo":
                return 1 / (answers * length)
            case "dr_grpo":
                return 1 / (answers * self._most)


class _Rewards(Accumulator):
    """eval_reward and its parts, means over the answers that were judged, and how long answers are."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(2 + 2 * (1 + len(names)))
        self._names = ["reward", *(f"reward_{name}" for name in names)]

    def add_answers(self, totals: NDArray[np.float64], scores: NDArray[np.float64], written: Sequence[Written]) -> None:
        """Adds one answer to each of some prompts. scores: (prompts, rewards)."""
        lengths, cut = sum(len(one.tokens) for one in written), sum(not one.ended for one in written)
        rewards = np.column_stack([totals, scores])
        sums = [0, len(written), lengths, cut, *np.nansum(rewards, axis=0), *(~np.isnan(rewards)).sum(axis=0)]
        self.sums += torch.tensor(sums, dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        """See Accumulator.

        Raises:
            UserError: there were answers, and none was judged.
        """
        prompts, lengths, cut, *rewards = self.sums[1:].tolist()
        sums, counts = rewards[: len(self._names)], rewards[len(self._names) :]
        if prompts and not counts[0]:
            raise UserError(
                "objective.grpo.rewards: of held-out prompts, or of those of a set or slice, no answer was judged; let a reward judge each"
            )
        found = {name: total / count for name, total, count in zip(self._names, sums, counts, strict=True) if count}
        found |= {"completion_length": lengths / max(1, prompts), "truncated": cut / max(1, prompts)}
        return {f"eval_{name}": value for name, value in found.items()}


def answer_keys(seed: int, step: int, rows: NDArray[np.int64], answers: int) -> NDArray[np.uint64]:
    """(rows, answers): what each answer is drawn by."""
    each = [np.random.SeedSequence([seed, 9, step, int(row)]).generate_state(answers, np.uint64) for row in rows]
    return np.array(each, dtype=np.uint64).reshape(len(rows), answers)


def _mean(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """(groups) of (groups, answers): of what was judged; 0 where nothing was."""
    mean: NDArray[np.float64] = np.nansum(totals, axis=1) / np.maximum(1, (~np.isnan(totals)).sum(axis=1))
    return mean


def _spread(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """(groups) of (groups, answers): the standard deviation of a sample of what was judged; 0 of fewer than two."""
    squares = np.nansum((totals - _mean(totals)[:, None]) ** 2, axis=1)
    spread: NDArray[np.float64] = np.sqrt(squares / np.maximum(1, (~np.isnan(totals)).sum(axis=1) - 1))
    return spread


def _tokens(rows: RowSet, row: int) -> NDArray[np.int64]:
    return rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].astype(np.int64)
