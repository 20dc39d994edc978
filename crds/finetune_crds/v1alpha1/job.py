"""The kind FineTuneJob: metadata rules, the freeze of outcome-deciding fields, printer columns."""

from typing import Any, ClassVar

from .common import ApiModel, Raw, Rule
from .spec import FineTuneJobSpec
from .status import FineTuneJobStatus

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
NAME_MAX = 40

OUTCOME_FIELDS = (
    "task",
    "model",
    "dataset",
    "objective",
    "method",
    "training",
    "evaluation",
    "output",
    "runtime.image",
    "runtime.command",
    "runtime.args",
)
"""Paths under spec that decide what comes out. Frozen while training and after Complete; `spec_digest` is over these."""


def _unchanged(path: str) -> str:
    """CEL: the field is absent on both sides, or present on both and equal (a rule on an optional field would be passed by remove-then-add)."""
    parts = path.split(".")
    guards = [f"has(SIDE.spec.{'.'.join(parts[: i + 1])})" for i in range(len(parts))]
    here, there = (" && ".join(g.replace("SIDE", side) for g in guards) for side in ("self", "oldSelf"))
    return f"(({here}) == ({there}) && (!({here}) || self.spec.{path} == oldSelf.spec.{path}))"


def _holds(condition: str) -> str:
    return f"oldSelf.status.conditions.exists(c, c.type == '{condition}' && c.status == 'True')"


class FineTuneJob(ApiModel):
    """Fine-tunes a model: reads a model and a dataset, trains, and writes an adapter or a model."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= {NAME_MAX}",
            f"metadata.name must start with a letter, hold only lower-case letters, digits and -, and have at most {NAME_MAX} characters: it becomes part of host names",
        ),
    )
    transition_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!has(oldSelf.status) || !has(oldSelf.status.conditions) || !{_holds('SpecFrozen')} || ("
            + " && ".join(_unchanged(path) for path in OUTCOME_FIELDS)
            + ")",
            "training has begun, and what decides its outcome ("
            + ", ".join(OUTCOME_FIELDS)
            + ") can no longer change: create another FineTuneJob; after a failure it can be edited again",
        ),
    )

    api_version: str = API_VERSION
    """finetune.dev/v1alpha1"""
    kind: str = KIND
    """FineTuneJob"""
    metadata: Raw = {}
    """Standard object metadata."""
    spec: FineTuneJobSpec
    """What to train, on what, how, and where the result goes."""
    status: FineTuneJobStatus | None = None
    """State, written by the operator."""


PRINTER_COLUMNS: list[dict[str, Any]] = [
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Progress", "type": "string", "jsonPath": ".status.progress.display"},
    {"name": "Loss", "type": "string", "jsonPath": ".status.metrics[?(@.name=='loss')].value"},
    {"name": "GPUs", "type": "integer", "jsonPath": ".status.gpus"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Reason", "type": "string", "priority": 1, "jsonPath": ".status.failure.cause"},
    {"name": "Output", "type": "string", "priority": 1, "jsonPath": ".status.output.uri"},
]
