"""Which of the prepared rows are trained on: without duplicates, without rows of evaluation, within a budget. Called by holdout.

Counted here are rows of the files: a long text that became several prepared rows stays or goes as one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_crds.resolved import ResolvedDataset

from ..errors import DataError
from .near_duplicates import SIZE, repeated
from .prepared import RowSet

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Ids of prepared rows. Of what is told of rows of the files, the first prepared row of each."""

    train: Ids
    """Rows to train on."""
    duplicates: Ids
    """Rows of training that equal an earlier one; left out with deduplicate."""
    leaked: Ids
    """Rows of training that equal a row of evaluation; left out with deduplicate."""
    over_budget: Ids
    """Rows left out for the token budget."""
    deduplicated: bool

    @property
    def dropped(self) -> int:
        """Rows of the files that are left out here."""
        return (len(self.duplicates) + len(self.leaked)) * self.deduplicated + len(self.over_budget)


def select(rows: RowSet, train: Ids, evaluated: Ids, dataset: ResolvedDataset, seed: int) -> Selection:
    """Chooses among rows to train on.

    Args:
        rows: the prepared set.
        train: candidates.
        evaluated: rows of evaluation, of all its sets.
        dataset: says what to leave out.
        seed: of the draw for the token budget.

    Raises:
        DataError: none is left.
    """
    examples = rows.examples
    is_first = np.diff(examples, prepend=-1) > 0
    candidates, evaluated = train[is_first[train]], evaluated[is_first[evaluated]]
    is_leaked = np.isin(rows.content[candidates], rows.content[evaluated])
    rest = candidates[~is_leaked]
    is_repeated = np.ones(len(rest), np.bool_)
    is_repeated[np.unique(rows.content[rest], return_index=True)[1]] = False
    leaked, duplicates, kept = candidates[is_leaked], rest[is_repeated], rest[~is_repeated]
    if dataset.deduplicate == "near":
        signatures = rows.signatures.reshape(-1, SIZE)
        both = np.concatenate([evaluated, kept])
        near_leaked = repeated(signatures, examples[both], len(evaluated))[len(evaluated) :]
        leaked, kept = np.sort(np.append(leaked, kept[near_leaked])), kept[~near_leaked]
        near_repeated = repeated(signatures, examples[kept])
        duplicates, kept = np.sort(np.append(duplicates, kept[near_repeated])), kept[~near_repeated]
    chosen = kept if dataset.deduplicate else candidates
    if len(candidates) and not len(chosen):
        raise DataError(
            "dataset.deduplicate: every training row equals a row of evaluation; correct dataset.train or dataset.evaluation"
        )
    over_budget = candidates[:0]
    if dataset.token_budget:
        lengths = np.add.reduceat(rows.lengths, np.flatnonzero(is_first))
        draw = np.random.default_rng([seed, 6])
        drawn = _proportionally(draw, chosen, rows) if rows.index.shares else draw.permutation(chosen)
        fits = np.cumsum(lengths[examples[drawn]]) <= dataset.token_budget
        chosen, over_budget = np.sort(drawn[fits]), np.sort(drawn[~fits])
        if len(candidates) and not len(chosen):
            raise DataError(f"dataset.tokenBudget {dataset.token_budget} is less than a row has tokens; raise it")
    is_chosen = np.zeros(int(examples[-1]) + 1, np.bool_)
    is_chosen[examples[chosen]] = True
    return Selection(
        train[is_chosen[examples[train]]], duplicates, leaked, over_budget, dataset.deduplicate is not None
    )


def _proportionally(draw: np.random.Generator, chosen: Ids, rows: RowSet) -> Ids:
    """Shuffled so that a row of a source that was read in part stands for those that were not (Efraimidis and Spirakis 2006)."""
    shares = np.array([rows.index.shares.get(int(source), 1.0) for source in rows.sources[chosen]])
    shuffled: Ids = chosen[np.argsort(draw.exponential(size=len(chosen)) * shares)]
    return shuffled
