"""What a run must remember besides weights: kept in each checkpoint's index, exact (Python writes floats so that they read back equal)."""

import math

from pydantic import BaseModel

from finetune_crds.support import METRICS

Metrics = dict[str, float]


class Evaluated(BaseModel):
    """Metrics at a step."""

    step: int
    metrics: Metrics


class MicroBatch(BaseModel):
    """Sequences in a forward pass, where a GPU's memory decided that: another number rounds differently, and draws other dropout."""

    size: int
    world: int
    """Ranks among which it was found."""
    memory: int
    """Bytes of the smallest of their GPUs."""


class TrainingState(BaseModel):
    """Where training stands at a step boundary. The order of data and the dropout are functions of the step, so they need no state."""

    step: int = 0
    """Optimizer steps done."""
    epoch: float = 0.0
    """Passes done."""
    before: Metrics | None = None
    """Metrics of the model as it was."""
    benchmarks: Metrics | None = None
    """What evaluation.benchmarks said of it."""
    last: Evaluated | None = None
    """The latest evaluation on the way."""
    best: Evaluated | None = None
    """The best one."""
    stale: int = 0
    """Evaluations since the best."""
    micro_batch: MicroBatch | None = None
    """Where the job does not say, and training is on GPUs."""
    beginning: str = ""
    """Digest of what training began from and no seed decides (see Method.beginning)."""
    stopped_early: bool = False
    """Whether early stopping ended training here."""

    @property
    def began(self) -> Metrics | None:
        """All that was measured before training."""
        return joined(self.before, self.benchmarks)

    def note(self, metrics: Metrics, metric: str, min_delta: float, patience: int | None) -> bool:
        """Takes in an evaluation at this step. True if it is the best so far."""
        self.last = Evaluated(step=self.step, metrics=metrics)
        improved = self.best is None or _better(metrics[metric], self.best.metrics[metric], metric, min_delta)
        if improved and not math.isnan(metrics[metric]):
            self.best = self.last
            self.stale = 0
            return True
        self.stale += 1
        self.stopped_early = patience is not None and self.stale >= patience
        return False


def joined(held_out: Metrics | None, benchmarks: Metrics | None) -> Metrics | None:
    """Both, or None where nothing was measured."""
    return {**(held_out or {}), **(benchmarks or {})} or None


def _better(value: float, best: float, metric: str, min_delta: float) -> bool:
    """Whether a value is better by more than min_delta."""
    gain = best - value if METRICS[metric].lower_is_better else value - best
    return gain > min_delta
