"""Order and packing are pure functions of (seed, epoch): nothing is lost, nothing depends on ranks, weights are shares of tokens."""

import math
import os
import subprocess
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest

from finetune_trainer.data.order import Batching, Order, share
from finetune_trainer.data.packing import packed
from finetune_trainer.errors import DataError, UserError


def lengths(count: int = 1000, seed: int = 0) -> Any:
    return np.clip(np.random.default_rng(seed).lognormal(4, 1, count), 2, 512).astype(np.int64)


def order(
    count: int = 1000, *, pack: bool = True, seed: int = 42, weights: Any = None, sources: Any = None, **batching: Any
) -> Order:
    chosen = batching or {"batch_size": 8}
    sources = np.zeros(count, dtype=np.int32) if sources is None else sources
    return Order(np.arange(count), lengths(count), sources, weights, seed, Batching(512, pack, **chosen))


def flat(steps: Any) -> list[int]:
    return [int(row) for step in steps for sequence in step for row in sequence]


def test_to_train_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="epochs 0"):
        order().total_steps(0.0)
    with pytest.raises(DataError, match="weight"):
        order(weights=[0.0, 1.0])  # every row is of the first source


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("batching", [{"batch_size": 7}, {"tokens_per_step": 2048}])
def test_every_row_once_an_epoch(pack: bool, batching: dict[str, int]) -> None:
    one = order(pack=pack, **batching)
    for epoch in (0, 1):
        assert sorted(flat(one.epoch(epoch))) == list(range(1000))
    assert flat(one.epoch(0)) != flat(one.epoch(1))
    assert flat(one.epoch(0)) != flat(order(pack=pack, seed=43, **batching).epoch(0))


def test_an_epoch_is_the_same_in_another_process() -> None:
    code = "from unit.trainer.test_order import *; print(flat(order().epoch(3)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "5"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(flat(order().epoch(3)))


def test_packs_are_full_and_within_bounds() -> None:
    rows = np.arange(10_000)
    size = lengths(10_000)
    sequences = packed(rows, size, 512, np.random.default_rng(1))
    tokens = [int(size[sequence].sum()) for sequence in sequences]
    assert sorted(int(row) for sequence in sequences for row in sequence) == list(range(10_000))
    assert max(tokens) <= 512
    assert sum(tokens) / (512 * len(sequences)) > 0.97
    first = tokens[: len(tokens) // 2]
    assert abs(np.mean(first) - np.mean(tokens)) < 10, "sequences of a window are shuffled, not sorted by size"


def test_tokens_per_step_are_kept() -> None:
    one = order(pack=False, tokens_per_step=2048)
    tokens = [sum(int(one.lengths[sequence].sum()) for sequence in step) for step in one.epoch(0)]
    assert max(tokens) <= 2048
    assert min(tokens[:-1]) > 2048 - 512


@pytest.mark.parametrize("epochs", [0.5, 1, 2, 2.25])
def test_total_steps(epochs: float) -> None:
    one = order(pack=False, batch_size=8)
    assert one.total_steps(epochs) == math.ceil(125 * epochs)


def test_walking_from_the_middle_is_the_same_walk() -> None:
    one = order()
    whole = [flat([step]) for _, step in islice(one.walk(0), 60)]
    for start in (0, 1, 17, 30, 31, 59):
        assert [flat([step]) for _, step in islice(one.walk(start), 60 - start)] == whole[start:]
    assert next(iter(one.walk(len(one.epoch(0)) - 1)))[0] == 1.0


@pytest.mark.parametrize("world", [1, 2, 3, 8, 20])
@pytest.mark.parametrize(
    "how", [{"size": 1, "forwards": None}, {"size": 3, "forwards": None}, {"size": None, "forwards": 2}]
)
def test_ranks_share_a_step_without_rest(world: int, how: dict[str, Any]) -> None:
    step = order(batch_size=16).epoch(0)[0]
    shares = [share(step, rank, world, **how) for rank in range(world)]
    assert sorted(flat([part for parts in shares for part in parts])) == sorted(flat([step]))
    if how["size"]:
        assert all(len(part) <= how["size"] for parts in shares for part in parts)
    else:
        assert all(len(parts) <= 2 for parts in shares)


def test_weights_are_shares_of_tokens() -> None:
    sources = np.array([0] * 900 + [1] * 100, dtype=np.int32)
    one = order(weights=[0.25, 0.75], sources=sources)
    seen = np.zeros(1000, dtype=int)
    for epoch in range(4):
        rows = flat(one.epoch(epoch))
        tokens = one.lengths[rows]
        part = tokens[sources[rows] == 1].sum() / tokens.sum()
        assert abs(part - 0.75) < 0.01
        assert abs(tokens.sum() / one.tokens - 1) < 0.01
        np.add.at(seen, rows, 1)
    for source in (0, 1):
        counts = seen[sources == source]
        assert counts.max() - counts.min() <= 1, "no row comes twice before every row of its source came once"
