"""Held-out evaluation: metrics as sums over rows, added up over ranks. Called by train."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .data import packing
from .data.order import Batching, share
from .data.prepared import RowSet
from .modelling.models import Model
from .objectives import Objective
from .objectives.objective import Accumulator
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
        """
        self._objective, self._rows, self._sets, self._slices = objective, rows, sets, slices
        self._batching, self._size, self._ranks = batching, size, ranks

    def __call__(self, model: Model, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics, the same for any micro-batch size, packing and number of ranks up to rounding; eval_NAME_loss of a set, eval_loss.NAME of a slice.

        Args:
            model: put into evaluation mode meanwhile.
            stopping: whether this rank was asked to stop; asked between batches.

        Returns:
            Metrics, or None if any rank was asked to stop before it was through.
        """
        metrics: dict[str, float] = {}
        model.outer.eval()
        for name, ids in self._sets.items():
            masks = self._rows.slices[ids] if not name else np.zeros(len(ids), dtype=np.int32)
            parts: dict[int, Accumulator] = {}
            for mask in np.unique(masks).tolist():
                found = self._measured(model, ids[masks == mask], stopping)
                if found is None:
                    model.outer.train()
                    return None
                parts[mask] = found
            if parts:
                prefix = f"eval_{name}_" if name else "eval_"
                whole = self._merged(list(parts.values())).metrics()
                metrics |= {prefix + metric.removeprefix("eval_"): value for metric, value in whole.items()}
            for i, slice_name in enumerate([] if name else self._slices):
                inside = [found for mask, found in parts.items() if mask >> i & 1]
                if inside:
                    metrics |= {f"{metric}.{slice_name}": value for metric, value in self._merged(inside).metrics().items()}  # fmt: skip
        model.outer.train()
        return metrics

    def _merged(self, parts: Sequence[Accumulator]) -> Accumulator:
        whole = self._objective.accumulator()
        for part in parts:
            whole.merge(part)
        return whole

    def _measured(self, model: Model, ids: NDArray[np.int64], stopping: Callable[[], bool]) -> Accumulator | None:
        if self._batching.pack:
            sequences = packing.packed(ids, self._rows.lengths, self._batching.capacity, np.random.default_rng(0))
        else:
            sequences = packing.singly(ids)
        ranks, objective = self._ranks, self._objective
        found = objective.accumulator()
        stopped = False
        with torch.no_grad():
            for own in share(sequences, ranks.rank, ranks.world, size=self._size, forwards=None):
                if stopped := stopping():
                    break
                objective.measure(model, objective.batch(self._rows, own, ranks.device), found)
        if ranks.any(stopped):
            return None
        found.join(ranks)
        return found
