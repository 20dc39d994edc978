"""Held-out evaluation: metrics as sums over rows, added up over ranks. Called by train."""

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .data import packing
from .data.order import Batching, share
from .data.prepared import RowSet
from .errors import Interrupted
from .modelling.models import Model, inference
from .objectives import Objective
from .objectives.objective import Accumulator, Guess
from .ranks import Ranks


class Evaluator:
    """Evaluates a model on some sets of rows, and on slices of the first."""

    def __init__(
        self,
        objective: Objective,
        rows: RowSet,
        sets: Mapping[str, NDArray[np.int64]],
        slices: Sequence[str],
        batching: Batching,
        size: int,
        ranks: Ranks,
        guess: Guess | None = None,
    ) -> None:
        """
        Args:
            objective: what is measured.
            rows: the prepared set.
            sets: ids of rows by name; that of the held-out rows is empty.
            slices: names of evaluation.slices.
            batching: whether to pack.
            size: sequences in one forward pass.
            ranks: who shares the work.
            guess: what the baseline is of, where the model has no answer of its own yet.
        """
        self._objective, self._rows, self._sets, self._slices = objective, rows, sets, slices
        self._batching, self._size, self._ranks = batching, size, ranks
        self._guess = guess

    def __call__(
        self, model: Model, stopping: Callable[[], bool], *, on_the_way: bool = False
    ) -> dict[str, float] | None:
        """Metrics, the same for any micro-batch size, packing and number of ranks up to rounding; eval_NAME_loss of a set, eval_loss.NAME of a slice.

        Args:
            model: put into evaluation mode meanwhile.
            stopping: whether this rank was asked to stop; asked between batches.
            on_the_way: whether to leave out what the model would have to write for it.

        Returns:
            Metrics, or None if any rank was asked to stop before it was through.
        """
        accumulator = self._objective.accumulator_on_the_way if on_the_way else self._objective.accumulator
        with inference(model):
            return self._by_set(accumulator, lambda ids: self._measured(model, ids, stopping, accumulator()))

    def of_size(self, size: int) -> "Evaluator":
        """The same with so many sequences in one forward pass."""
        made = copy.copy(self)
        made._size = size
        return made

    def baseline(self, model: Model, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """The same of the model before training; of a head that is new, of always giving the answer that fits the training rows best."""
        if self._guess is None:
            return self(model, stopping)
        return self._by_set(self._objective.accumulator, self._guess)

    def _by_set(
        self, accumulator: Callable[[], Accumulator], measured: Callable[[NDArray[np.int64]], Accumulator | None]
    ) -> dict[str, float] | None:
        def merged(parts: Sequence[Accumulator]) -> Accumulator:
            whole = accumulator()
            for part in parts:
                whole.merge(part)
            return whole

        metrics: dict[str, float] = {}
        for name, ids in self._sets.items():
            masks = self._rows.slices[ids] if not name else np.zeros(len(ids), dtype=np.int32)
            parts: dict[int, Accumulator] = {}
            for mask in np.unique(masks).tolist():
                found = measured(ids[masks == mask])
                if found is None:
                    return None
                parts[mask] = found
            if parts:
                prefix = f"eval_{name}_" if name else "eval_"
                whole = merged(list(parts.values())).metrics()
                metrics |= {prefix + metric.removeprefix("eval_"): value for metric, value in whole.items()}
            for i, slice_name in enumerate([] if name else self._slices):
                inside = [found for mask, found in parts.items() if mask >> i & 1]
                if inside:
                    metrics |= {f"{metric}.{slice_name}": value for metric, value in merged(inside).metrics().items()}  # fmt: skip
        return metrics

    def _measured(
        self, model: Model, ids: NDArray[np.int64], stopping: Callable[[], bool], found: Accumulator
    ) -> Accumulator | None:
        if self._batching.pack:
            sequences = packing.packed(ids, self._rows.lengths, self._batching.capacity, np.random.default_rng(0))
        else:
            sequences = packing.singly(ids)
        ranks, objective = self._ranks, self._objective
        stopped = False
        with torch.no_grad():
            for own in share(sequences, ranks.rank, ranks.world, size=self._size, forwards=None):
                if stopped := stopping():
                    break
                try:
                    objective.measure(model, objective.batch(self._rows, own, ranks.device), found)
                except Interrupted:
                    stopped = True
                    break
        if ranks.any(stopped):
            return None
        found.join(ranks)
        return found
