"""What a run tells: its reports on the way, and the verdict at the end. Called by train on every rank; only the first rank's is sent."""

import time
from dataclasses import dataclass, field

from finetune_crds.progress import RunReport
from finetune_crds.v1alpha1 import CheckpointsStatus, EvaluationStatus, Inputs, Metric, OutputStatus
from finetune_crds.v1alpha1.status import METRICS_MAX, Baseline, FewShotStatus, metric_rank
from finetune_crds.verdict import Verdict

from ..data.holdout import GENERAL
from ..results.checkpoints import Committed
from ..results.state import Metrics, TrainingState
from . import verdicts
from .reporter import Progress

GENERAL_LOSS = f"eval_{GENERAL}_loss"
_WINDOW_SECONDS = 30.0


@dataclass
class Story:
    """State of a run, as others see it."""

    reporter: Progress
    attempt: int
    metric: str = "eval_loss"
    baseline: Baseline | None = None
    few_shot: FewShotStatus | None = None
    report: RunReport = field(init=False)
    metrics: Metrics = field(default_factory=dict)
    output: OutputStatus | None = None
    _tokens: int = 0
    _seconds: float = 0.0
    _recent: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.report = RunReport(attempt=self.attempt, stage="Preparing", step=0, total_steps=0)

    def tell(self, **changes: object) -> None:
        """Notes changes of the report, and sends it."""
        self.report = self.report.model_copy(update=changes)
        self.reporter.update(self.report, dict(self.metrics))

    def inputs(self, inputs: Inputs) -> None:
        """The inputs are known."""
        self.tell(inputs=inputs)

    def begins(self, state: TrainingState, total: int) -> None:
        """Training starts here."""
        self.tell(
            stage="Training", step=state.step, first_step=state.step, total_steps=total, epoch=f"{state.epoch:.2f}"
        )

    def step(self, state: TrainingState, metrics: Metrics, tokens: int, seconds: float) -> None:
        """A step is done."""
        self.metrics |= metrics
        self._tokens += tokens
        self._seconds += seconds
        now = time.monotonic()
        self._recent = [(at, count) for at, count in self._recent if now - at < _WINDOW_SECONDS] + [(now, tokens)]
        spent = now - self._recent[0][0]
        recent = sum(count for _, count in self._recent[1:]) / spent if spent > 0 else tokens / max(seconds, 1e-9)
        self.tell(step=state.step, epoch=f"{state.epoch:.2f}", tokens_per_second=round(recent) or None)

    def evaluated(self, state: TrainingState, metrics: Metrics) -> None:
        """An evaluation is done."""
        self.metrics |= metrics
        self.tell(
            evaluation=EvaluationStatus(
                before=_listed(state.began),
                baseline=self.baseline,
                after=self.report.evaluation.after if self.report.evaluation else None,
            )
        )

    def committed(self, latest: Committed | None, best: Committed | None, seconds: float = 0.0) -> None:
        """A checkpoint is there. The supervisor learns of it too, should this process be killed."""
        longest = max(self.report.longest_save_seconds or 0, int(seconds + 0.999))
        self.tell(
            checkpoints=CheckpointsStatus(
                latest=latest.status() if latest else None, best=best.status(self.metric) if best else None
            ),
            longest_save_seconds=longest or None,
        )
        verdicts.write(self.verdict(Verdict(code=70, message="the run did not end by itself")))

    def judged(self, before: Metrics | None, after: Metrics | None) -> None:
        """What would be published has been measured."""
        if after:
            self.tell(evaluation=self._evaluation(before, after))

    def finished(self, output: OutputStatus, before: Metrics | None, after: Metrics | None) -> None:
        """The output is there."""
        self.output = output
        evaluation = self._evaluation(before, after) if after else self.report.evaluation
        self.tell(stage="Finished", evaluation=evaluation)

    def _evaluation(self, before: Metrics | None, after: Metrics) -> EvaluationStatus:
        began, ended = (before or {}).get(GENERAL_LOSS), after.get(GENERAL_LOSS)
        forgetting = None if began is None or ended is None else f"{ended - began:.6g}"
        return EvaluationStatus(
            before=_listed(before),
            baseline=self.baseline,
            after=_listed(after),
            forgetting=forgetting,
            few_shot=self.few_shot,
        )

    def verdict(self, end: Verdict) -> Verdict:
        """The end, with how far it came."""
        report = self.report
        return end.model_copy(
            update={
                "first_step": report.first_step,
                "step": report.step,
                "total_steps": report.total_steps,
                "tokens_per_second": round(self._tokens / self._seconds) if self._tokens and self._seconds else None,
                "metrics": _listed(self.metrics) or [],
                "checkpoints": report.checkpoints,
                "inputs": report.inputs,
                "evaluation": report.evaluation,
                "output": self.output,
                "longest_save_seconds": report.longest_save_seconds,
            }
        )


def _listed(metrics: Metrics | None) -> list[Metric] | None:
    """The important ones first, and no more than status takes."""
    if metrics is None:
        return None
    names = sorted(sorted(metrics), key=metric_rank)
    return [Metric(name=name, value=f"{metrics[name]:.6g}") for name in names[:METRICS_MAX]]
