"""Which rows are trained on in which step: a pure function of (seed, epoch), the same for any number of ranks.

The position of a run is one integer, the step; resuming computes the same epochs again. Called by train.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, UserError
from . import packing

Step = list[packing.Sequence]
"""The sequences of one optimizer step, of all ranks."""


@dataclass(frozen=True)
class Batching:
    """How sequences are made and how many a step takes. Exactly one of batch_size and tokens_per_step is set."""

    capacity: int
    """Most tokens in one packed sequence: training.sequenceLength."""
    pack: bool
    batch_size: int | None = None
    tokens_per_step: int | None = None


@dataclass(frozen=True)
class Order:
    """The order of training."""

    rows: NDArray[np.int64]
    """Ids of the rows to train on."""
    lengths: NDArray[np.int64]
    """Tokens of every row of the set, by id; of images 1 each, so that shares are of images."""
    sources: NDArray[np.int32]
    """Source of every row of the set, by id."""
    weights: Sequence[float] | None
    """Share of the training tokens by source, or None: each row once an epoch."""
    seed: int
    batching: Batching
    repeats: int = 1
    """How often each step's rows are taken, in a row."""

    def __post_init__(self) -> None:
        """Raises DataError when there is nothing to draw from: `walk` would look for a step for ever."""
        weights = dict(enumerate(self.weights or ()))
        if weights and not any(weights[source] for source in np.unique(self.sources[self.rows])):
            raise DataError(
                "dataset.train: no source with a weight above 0 has a row to train on; give others a weight"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one epoch, about: weights cut at whole rows."""
        return int(self.lengths[self.rows].sum())

    def epoch(self, epoch: int) -> list[Step]:
        """The steps of an epoch, counted from 0."""
        shuffle = np.random.default_rng([self.seed, 1, epoch])
        rows = shuffle.permutation(self._drawn(epoch) if self.weights else self.rows)
        if self.batching.pack:
            sequences = packing.packed(rows, self.lengths, self.batching.capacity, shuffle)
        else:
            sequences = packing.singly(rows)
        return [step for step in self._steps(sequences) for _ in range(self.repeats)]

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps of so many passes; a fraction of a pass is rounded up to whole steps.

        Raises:
            UserError: there are none, and the result would be what went in.
        """
        whole = math.floor(epochs)
        steps = sum(len(self.epoch(epoch)) for epoch in range(whole))
        steps += math.ceil((epochs - whole) * len(self.epoch(whole)) - 1e-9) if epochs > whole else 0
        if steps < 1:
            raise UserError(f"training.epochs {epochs:g} is not a single step: raise it")
        return steps

    def walk(self, start: int) -> Iterator[tuple[float, Step]]:
        """Steps from number `start` on, for ever, each with the passes done when it is."""
        first = 0
        epoch = 0
        while True:
            steps = self.epoch(epoch)
            for i in range(max(0, start - first), len(steps)):
                yield epoch + (i + 1) / len(steps), steps[i]
            first += len(steps)
            epoch += 1

    def _steps(self, sequences: list[packing.Sequence]) -> Iterator[Step]:
        if self.batching.batch_size:
            size = self.batching.batch_size
            yield from (sequences[i : i + size] for i in range(0, len(sequences), size))
            return
        assert self.batching.tokens_per_step
        step: Step = []
        tokens = 0
        for sequence in sequences:
            length = int(self.lengths[sequence].sum())
            if step and tokens + length > self.batching.tokens_per_step:
                yield step
                step, tokens = [], 0
            step.append(sequence)
            tokens += length
        if step:
            yield step

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        """Rows of a weighted epoch: from each source its share of an epoch's tokens.

        A source is an endless stream of passes over its rows, each shuffled anew, and an epoch takes the next stretch of tokens of it:
        no row comes twice before every row of its source came once.
        """
        assert self.weights
        total = sum(self.weights)
        drawn = []
        for source, weight in enumerate(self.weights):
            rows = self.rows[self.sources[self.rows] == source]
            size = int(self.lengths[rows].sum())
            share = self.tokens * weight / total
            if not size or not share:
                continue
            start, end = epoch * share, (epoch + 1) * share
            for turn in range(int(start // size), math.ceil(end / size)):
                shuffled = np.random.default_rng([self.seed, 2, source, turn]).permutation(rows)
                begins = turn * size + np.cumsum(self.lengths[shuffled]) - self.lengths[shuffled]
                drawn.append(shuffled[(begins >= start) & (begins < end)])
        return np.concatenate(drawn) if drawn else self.rows[:0]


def share(step: Step, rank: int, world: int, *, size: int | None, forwards: int | None) -> list[Step]:
    """The micro-batches of one rank in a step. A rank may get none.

    Args:
        step: sequences of all ranks.
        rank: whose.
        world: number of ranks.
        size: sequences in one forward pass, or
        forwards: forward passes.
    """
    own = step[rank::world]
    size = size or max(1, math.ceil(len(own) / (forwards or 1)))
    return [own[i : i + size] for i in range(0, len(own), size)]
