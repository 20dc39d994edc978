"""evaluation.gates: whether a result is good enough to be published. Called by train."""

from collections.abc import Sequence

from finetune_crds.support import LOWER_IS_BETTER, METRICS
from finetune_crds.v1alpha1.evaluation import Gate

from .errors import GateFailed, UserError
from .results.state import Metrics


def check_known(gates: Sequence[Gate], metrics: Metrics, *, benchmarks: bool = False) -> None:
    """Makes sure, before training, that each gate has something to judge: those of held-out rows, or those of benchmarks.

    Raises:
        UserError: a gate's metric is not measured.
    """
    for gate in gates:
        if (gate.benchmark is not None) != benchmarks:
            continue
        if benchmarks and gate.name not in metrics:
            prefix = f"benchmark/{gate.benchmark}/"
            there = ", ".join(sorted(name.removeprefix(prefix) for name in metrics if name.startswith(prefix)))
            raise UserError(f"evaluation.gates: benchmark {gate.benchmark} has no metric {gate.metric}; it has {there}")
        if gate.name not in metrics:
            raise UserError(
                f"evaluation.gates: {gate.name} is not measured: its set or slice has no rows, or objective.classification.problem has no {gate.metric}; correct it or remove the gate"
            )


def check(gates: Sequence[Gate], before: Metrics | None, after: Metrics | None) -> None:
    """Judges a result.

    Raises:
        GateFailed: with every gate that does not hold.
    """
    failed = [why for gate in gates for why in _failures(gate, before or {}, after or {})]
    if failed:
        raise GateFailed(f"not published: {'; '.join(failed)}")


def holds(gate: Gate, before: Metrics, after: Metrics) -> bool:
    """Whether one does."""
    return not _failures(gate, before, after)


def _failures(gate: Gate, before: Metrics, after: Metrics) -> list[str]:
    value = after.get(gate.name)
    if value is None:
        return [f"{gate.name} was not measured"]
    found = []
    if gate.min is not None and not value >= float(gate.min):
        found.append(f"{gate.name} is {value:.4g}, below min {gate.min}")
    if gate.max is not None and not value <= float(gate.max):
        found.append(f"{gate.name} is {value:.4g}, above max {gate.max}")
    if gate.max_regression is not None:
        began = before.get(gate.name, float("nan"))
        worse = value - began if _lower_is_better(gate) else began - value
        if not worse <= float(gate.max_regression):
            found.append(
                f"{gate.name} went from {began:.4g} to {value:.4g}, worse by more than maxRegression {gate.max_regression}"
            )
    return found


def _lower_is_better(gate: Gate) -> bool:
    return gate.metric.split(".")[0] in LOWER_IS_BETTER if gate.benchmark else METRICS[gate.metric].lower_is_better
