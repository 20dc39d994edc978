"""Metrics that a run tells, in a report or in its last word: numbers under narrow names, since a user's program may send anything."""

import re
from collections.abc import Iterable

from finetune_crds.progress import MetricReport
from finetune_crds.v1alpha1 import METRICS_MAX, EvaluationStatus, Metric, metric_rank

_NAME = re.compile(r"[A-Za-z0-9_./-]{1,64}")


def decimal(text: str | None) -> str | None:
    """A number in at most six digits; None when it is none."""
    try:
        return None if text is None else f"{float(text):.6g}"
    except ValueError:
        return None


def metrics(told: Iterable[MetricReport | Metric]) -> list[Metric]:
    """Those with a name of our alphabet and a number, one for each name, the last counts."""
    numbers: dict[str, str] = {}
    for metric in told:
        number = decimal(metric.value)
        if number is not None and _NAME.fullmatch(metric.name):
            numbers[metric.name] = number
    return [Metric(name=name, value=value) for name, value in numbers.items()]


def leading(found: Iterable[Metric]) -> list[Metric]:
    """At most METRICS_MAX, the losses first, so that a program with hundreds keeps those that people look for."""
    return sorted(found, key=lambda metric: metric_rank(metric.name))[:METRICS_MAX]


def latest(earlier: Iterable[Metric], later: Iterable[Metric]) -> list[Metric]:
    """Both as one list, in which the later ones have what room there is."""
    kept = {metric.name: metric for metric in leading(later)}
    before = [metric for metric in leading(earlier) if metric.name not in kept]
    return leading([*before[: METRICS_MAX - len(kept)], *kept.values()])


def evaluation(told: EvaluationStatus) -> EvaluationStatus:
    """The same with numbers only."""
    shots = told.few_shot
    losses = {name: decimal(getattr(shots, name)) for name in ("before", "prompted", "after")} if shots else {}
    return told.model_copy(
        update={
            "before": leading(metrics(told.before)) if told.before else None,
            "after": leading(metrics(told.after)) if told.after else None,
            "forgetting": decimal(told.forgetting),
            "few_shot": shots.model_copy(update=losses) if shots and all(losses.values()) else None,
        }
    )
