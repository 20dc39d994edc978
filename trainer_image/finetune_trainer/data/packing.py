"""Packing rows into sequences. A pure function: no global random state, nothing of ranks. Called by order."""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

WINDOW = 4096
"""Rows that are packed among each other; larger packs tighter, smaller keeps the order of an epoch more random."""

Sequence = NDArray[np.int64]
"""Ids of the rows of one sequence."""


def singly(rows: NDArray[np.int64]) -> list[Sequence]:
    """One row a sequence."""
    return list(rows[:, None])


def packed(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int, order: np.random.Generator
) -> list[Sequence]:
    """Best-fit decreasing within windows of `rows`; the sequences of a window are shuffled, since it leaves them sorted by length.

    Args:
        rows: ids, in the order of the epoch.
        lengths: tokens of every row of the set, by id; none may exceed capacity.
        capacity: most tokens in one sequence.
        order: shuffles.
    """
    sequences: list[Sequence] = []
    for start in range(0, len(rows), WINDOW):
        window = rows[start : start + WINDOW]
        bins = _best_fit_decreasing(lengths[window], capacity)
        sequences += [window[np.sort(bins[i])] for i in order.permutation(len(bins))]
    return sequences


def _best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Positions by bin. Each row goes where the least space is left over; ties go to the oldest bin."""
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for position in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[position])
        found = bisect_left(space, (length, -1))
        if found == len(space):
            bins.append([position])
            insort(space, (capacity - length, len(bins) - 1))
        else:
            left, chosen = space.pop(found)
            bins[chosen].append(position)
            insort(space, (left - length, chosen))
    return bins
