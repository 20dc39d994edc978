"""The evaluation report: whether the result is better than what there was, where, and whether prompting would have done. Called by train.

evaluation.json holds numbers and names of the manifest; prompts and answers are in evaluation.html only. Both are a pure function of the
job and of what training noted, so that a resumed run writes the same bytes.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.support import METRICS
from finetune_crds.v1alpha1 import ApiModel
from finetune_crds.v1alpha1.evaluation import Gate
from finetune_crds.v1alpha1.status import Baseline

from .. import gates
from ..data.holdout import GENERAL, empty_slices, set_names
from ..prompting import Compared
from ..results import journal
from ..results.outputs import EVALUATION_NUMBERS, EVALUATION_REPORT
from ..results.state import Metrics, TrainingState

JSON: Final = EVALUATION_NUMBERS
HTML: Final = EVALUATION_REPORT
POINTS: Final = 200
"""Of a curve, at most."""
_WORSE: Final = 0.01
"""Part of a loss by which it must have risen to be worth a word."""


class MetricRow(ApiModel):
    """One metric at each point that matters."""

    name: str
    lower_is_better: bool
    baseline: float | None = None
    best: float | None = None
    """At the evaluation that was best by evaluation.metric."""
    last: float | None = None
    """At the latest evaluation on the way."""
    published: float | None = None
    improved: bool | None = None
    """Whether published is better than the baseline."""


class Measured(ApiModel):
    """The metrics of a set or a slice."""

    name: str
    kind: str
    """heldOut, set or slice."""
    rows: int
    metrics: list[MetricRow]


class Verdict(ApiModel):
    """What became of a gate."""

    metric: str
    condition: str
    passed: bool
    baseline: float | None = None
    value: float | None = None


class Curve(ApiModel):
    """Points of a line: steps and values."""

    name: str
    steps: list[float]
    values: list[float]


class EvaluationReport(ApiModel):
    """evaluation.json."""

    version: int = 1
    task: str
    objective: str | None = None
    method: str
    metric: str
    """What decides the best."""
    baseline: Baseline
    published_step: int
    best_step: int | None = None
    last_step: int | None = None
    total_steps: int
    stopped_early: bool
    sets: list[Measured]
    forgetting: float | None = None
    """Nats a token."""
    gates: list[Verdict]
    curves: list[Curve]
    few_shot: Compared | None = None
    findings: list[str]
    """What somebody who knows the trade would look at first."""


class Answers(NamedTuple):
    """To one prompt."""

    prompt: str
    base: str | None
    prompted: str | None
    """With examples in its prompt; None where that was not asked."""
    tuned: str | None


def report(
    spec: ResolvedFineTune,
    rows: Mapping[str, int],
    state: TrainingState,
    noted: Mapping[str, bytes],
    *,
    baseline: Baseline,
    published: int,
    after: Metrics | None,
    compared: Compared | None,
) -> EvaluationReport:
    """The numbers.

    Args:
        spec: the resolved job.
        rows: how many each set has, by name; that of the held-out rows is empty, slices are .NAME.
        state: of training, at its end.
        noted: the journal's files.
        baseline: what state.before is of.
        published: step of the weights that are judged.
        after: their metrics.
        compared: with prompting.
    """
    before = state.began or {}
    began, ended = (metrics.get(f"eval_{GENERAL}_loss") for metrics in (before, after or {}))
    found = EvaluationReport(
        task=spec.task,
        objective=spec.objective.name if spec.objective else None,
        method=spec.method.name,
        metric=spec.evaluation.metric,
        baseline=baseline,
        published_step=published,
        best_step=state.best.step if state.best else None,
        last_step=state.last.step if state.last else None,
        total_steps=state.step,
        stopped_early=state.stopped_early,
        sets=list(_sets(spec, rows, state, after or {})),
        forgetting=None if began is None or ended is None else ended - began,
        gates=[_verdict(gate, before, after or {}) for gate in spec.evaluation.gates],
        curves=_curves(noted.get(journal.METRICS, b"")),
        few_shot=compared,
        findings=[],
    )
    return found.model_copy(update={"findings": list(_findings(found))})


def files(found: EvaluationReport, spec: ResolvedFineTune, answers: list[Answers]) -> dict[str, bytes]:
    """Contents of both files by name."""
    from . import evaluation_page

    text = json.dumps(found.to_wire(), indent=1, ensure_ascii=False) + "\n"
    return {JSON: text.encode(), HTML: evaluation_page.render(spec, found, answers).encode()}


def answers(noted: Mapping[str, bytes], prompts: list[str], prompted: list[str | None]) -> list[Answers]:
    """Each prompt's answers side by side, of samples.jsonl and of what the base said behind examples, if it was asked."""
    lines = [json.loads(line) for line in noted.get(journal.SAMPLES, b"").decode().splitlines()]
    said = {when: [line["answer"] for line in lines if line["when"] == when] for when in ("before", "after")}
    base, tuned = (said[when] or [None] * len(prompts) for when in ("before", "after"))
    return [
        Answers(*one)
        for one in zip(prompts, base, prompted or [None] * len(prompts), tuned, strict=True)
    ]  # fmt: skip


def _sets(spec: ResolvedFineTune, rows: Mapping[str, int], state: TrainingState, after: Metrics) -> Iterable[Measured]:
    named = [
        ("", "heldOut"),
        *((f".{one.name}", "slice") for one in spec.evaluation.slices),
        *((name, "set") for name in set_names(spec)),
    ]
    best, last = (point.metrics if point else {} for point in (state.best, state.last))
    for name, kind in named:
        metrics = []
        for full in sorted({**(state.began or {}), **after}, key=lambda one: (not one.endswith("loss"), one)):
            metric = _metric_of(full, name, kind, set_names(spec))
            if metric is None:
                continue
            lower = metric in METRICS and METRICS[metric].lower_is_better
            values = [point.get(full) for point in (state.began or {}, best, last, after)]
            improved = None
            if values[0] is not None and values[3] is not None:
                improved = values[3] < values[0] if lower else values[3] > values[0]
            metrics.append(
                MetricRow(
                    name=metric, lower_is_better=lower, baseline=values[0], best=values[1], last=values[2],
                    published=values[3], improved=improved,
                )
            )  # fmt: skip
        if metrics or (kind == "slice" and not rows.get(name)):
            yield Measured(name=name.removeprefix("."), kind=kind, rows=rows.get(name, 0), metrics=metrics)


def _metric_of(full: str, name: str, kind: str, sets: list[str]) -> str | None:
    """The metric without the set's or the slice's name; None if it is another's."""
    if kind == "slice":
        return full.removesuffix(name) if full.endswith(name) else None
    if "." in full:
        return None
    if kind == "set":
        prefix = f"eval_{name}_"
        return f"eval_{full.removeprefix(prefix)}" if full.startswith(prefix) else None
    return None if any(full.startswith(f"eval_{one}_") for one in sets) else full


def _verdict(gate: Gate, before: Metrics, after: Metrics) -> Verdict:
    conditions = [
        f"{words} {value}"
        for words, value in (("at least", gate.min), ("at most", gate.max), ("worse by at most", gate.max_regression))
        if value is not None
    ]
    return Verdict(
        metric=gate.name,
        condition=", ".join(conditions),
        baseline=before.get(gate.name),
        value=after.get(gate.name),
        passed=gates.holds(gate, before, after),
    )


def _curves(metrics: bytes) -> list[Curve]:
    """The loss of training, as means over equal stretches of steps, and that of the held-out rows and sets."""
    lines = [json.loads(line) for line in metrics.decode().splitlines()]
    found = []
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    width = -(-len(train) // POINTS) or 1
    parts = [train[i : i + width] for i in range(0, len(train), width)]
    if parts:
        means = [[sum(pair[i] for pair in part) / len(part) for part in parts] for i in (0, 1)]
        found.append(Curve(name="training", steps=means[0], values=means[1]))
    names = [name for line in lines for name in line if name.startswith("eval_") and name.endswith("_loss")]
    for name in dict.fromkeys(names):
        points = {line["step"]: line[name] for line in lines if name in line}
        every = -(-len(points) // POINTS)
        kept = [point for i, point in enumerate(points.items()) if i % every == 0 or i == len(points) - 1]
        label = "held-out rows" if name == "eval_loss" else name.removeprefix("eval_").removesuffix("_loss")
        found.append(Curve(name=label, steps=[step for step, _ in kept], values=[value for _, value in kept]))
    return found


def _findings(found: EvaluationReport) -> Iterable[str]:
    whole = next((one for one in found.sets if one.kind == "heldOut"), None)
    if whole is None:
        yield "Nothing was held out: nobody knows whether the result is better than what there was."
        return
    decisive = next((one for one in whole.metrics if one.name == found.metric), whole.metrics[0])
    compared_with = "the model before" if found.baseline == "model" else "always giving the same answer"
    if decisive.improved is False:
        yield f"By {decisive.name} the result is no better than {compared_with}."
    yield from empty_slices({one.name: one.rows for one in found.sets if one.kind == "slice"})
    failed = [gate.metric for gate in found.gates if not gate.passed]
    if failed:
        yield f"Gates that do not hold: {', '.join(failed)}."
    if found.few_shot:
        yield found.few_shot.sentence
    loss = next((one for one in whole.metrics if one.name == "eval_loss"), None)
    if loss and loss.best is not None and loss.last is not None and loss.last > loss.best * (1 + _WORSE):
        yield f"The loss on held-out rows was {loss.best:.4g} at step {found.best_step} and {loss.last:.4g} at step {found.last_step}: from there on training overfits."
    harmed = [one.name for one in found.sets if one.kind == "slice" and any(row.name == decisive.name and row.improved is False for row in one.metrics)]  # fmt: skip
    if harmed and decisive.improved:
        yield f"By {decisive.name} the whole is better, and these slices are not: {', '.join(harmed)}."
    if found.forgetting is not None and found.forgetting > 0:
        yield f"The model has forgotten: its loss on general data rose by {found.forgetting:.3g} nats a token."
