"""Which rows are trained on and which are evaluated on: a pure function of the prepared set and the job. Called by setup and objectives."""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_crds.resolved import ResolvedFineTune

from .prepared import RowSet
from .selection import Selection, select

SHARE: Final = 0.02
"""Part of the training rows that is held out when nobody says, within these bounds:"""
LEAST: Final = 16
MOST: Final = 2000
LARGEST_SHARE: Final = 0.1

GENERAL: Final = "general"
"""Name of the set that tells what is forgotten."""

Rows = NDArray[np.int64]


class Division(NamedTuple):
    """Ids of rows."""

    train: Rows
    held_out: Rows
    sets: dict[str, Rows]
    """More sets to evaluate on, by name."""
    selection: Selection
    """What of the rows to train on was left out, and why."""


def set_names(spec: ResolvedFineTune) -> list[str]:
    """Names of the sets beside the held-out rows, in the order of their source numbers."""
    evaluation = spec.dataset.evaluation
    if evaluation is None:
        return []
    return [one.name for one in evaluation.sets or ()] + [GENERAL] * bool(evaluation.general)


def slice_rows(spec: ResolvedFineTune, rows: RowSet, held_out: Rows) -> dict[str, int]:
    """How many held-out rows each of evaluation.slices has, by name."""
    masks = rows.slices[held_out]
    return {one.name: int((masks >> i & 1).sum()) for i, one in enumerate(spec.evaluation.slices)}


def empty_slices(counts: Mapping[str, int]) -> Iterable[str]:
    """A sentence about slices without rows, if there are such."""
    if empty := [name for name, count in counts.items() if not count]:
        yield f"No held-out row is in these of evaluation.slices, and nothing is measured of them: {', '.join(empty)}."


def divide(spec: ResolvedFineTune, rows: RowSet) -> Division:
    """The rows of a job.

    Rows of evaluation sources are evaluated on. Of a fraction the hash of a row's group decides, so that what belongs together stays on
    one side and a row stays on its side as the set grows; at least the group with the lowest hash is held out.
    """
    evaluation = spec.dataset.evaluation
    held_out = rows.sources == -1
    training = rows.sources >= 0
    if evaluation and evaluation.fraction is not None:
        fraction = float(evaluation.fraction)
        if fraction > 0:
            chosen = rows.groups < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
            held_out = training & (chosen if (training & chosen).any() else rows.groups == rows.groups[training].min())
    elif not (evaluation and evaluation.sources):
        held_out = training & _usual(rows.groups, training)
    sets = {name: np.flatnonzero(rows.sources == -2 - i) for i, name in enumerate(set_names(spec))}
    evaluated = np.concatenate([np.flatnonzero(held_out), *sets.values()])
    selection = select(rows, np.flatnonzero(training & ~held_out), evaluated, spec.dataset, spec.training.seed)
    return Division(selection.train, np.flatnonzero(held_out), sets, selection)


def _usual(groups: NDArray[np.uint64], training: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The lowest hashes, as many as is usual; none where that would be more than a tenth, as of rows that are all alike."""
    count = int(training.sum())
    largest = int(count * LARGEST_SHARE)
    wanted = min(max(LEAST, int(count * SHARE)), MOST, largest)
    if wanted < 1:
        return np.zeros_like(training)
    last = np.partition(groups[training], wanted - 1)[wanted - 1]
    chosen: NDArray[np.bool_] = groups <= last
    if int((training & chosen).sum()) > 2 * largest:
        chosen = groups < last
    return chosen
