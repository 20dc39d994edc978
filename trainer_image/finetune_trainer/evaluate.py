"""Held-out evaluation: metrics as sums over rows, added up over ranks. Called by train."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from .data import packing
from .data.order import Batching, share
from .data.prepared import RowSet
from .modelling.models import Model
from .objectives import Objective
from .ranks import Ranks


def evaluate(
    model: Model,
    objective: Objective,
    rows: RowSet,
    held_out: NDArray[np.int64],
    batching: Batching,
    size: int,
    ranks: Ranks,
    stopping: Callable[[], bool],
) -> dict[str, float] | None:
    """Metrics on the held-out rows, the same for any micro-batch size, packing and number of ranks up to rounding.

    Args:
        model: put into evaluation mode meanwhile.
        objective: what is measured.
        rows: the prepared set.
        held_out: ids of the rows.
        batching: whether to pack.
        size: sequences in one forward pass.
        ranks: who shares the work.
        stopping: whether this rank was asked to stop; asked between batches.

    Returns:
        Metrics, or None if any rank was asked to stop before it was through.
    """
    if batching.pack:
        sequences = packing.packed(held_out, rows.lengths, batching.capacity, np.random.default_rng(0))
    else:
        sequences = packing.singly(held_out)
    found = objective.accumulator()
    stopped = False
    model.outer.eval()
    with torch.no_grad():
        for sequences_of_batch in share(sequences, ranks.rank, ranks.world, size=size, forwards=None):
            if stopped := stopping():
                break
            objective.measure(model, objective.batch(rows, sequences_of_batch, ranks.device), found)
    model.outer.train()
    if ranks.any(stopped):
        return None
    found.join(ranks)
    return found.metrics()
