"""The body of a POST -> a report that holds nothing but numbers, names and places.

What is sent comes from a user's program, and status, metrics and logs may carry no training text. So metrics are numbers under narrow names
(figures.py), and places, digests and times must look like such.
"""

import math
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from finetune_crds.progress import BODY_MAX, ProgressReport, RunReport
from finetune_crds.v1alpha1 import CheckpointsStatus, Inputs

from ..figures import decimal, metrics
from .refusals import Refused

STEP_METRIC: Final = "current_step"
TOTAL_METRIC: Final = "total_steps"
EPOCH_METRIC: Final = "current_epoch"
"""Names under which a stock callback sends what has a field of its own in status."""

_PLACE = re.compile(r"[a-z0-9]+://[^\s]+")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@+-]*")
_COUNT_MAX: Final = 2**53 - 1
"""Largest integer that every JSON reader keeps."""


def parse(body: bytes) -> ProgressReport:
    """Reads a body.

    Raises:
        Refused: 413 or 400, naming the field; never with what it held.
    """
    if len(body) > BODY_MAX:
        raise Refused(413, f"the body may have at most {BODY_MAX} bytes")
    try:
        report = ProgressReport.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise Refused(400, f"{where}: {first['msg']}") from None
    if report.finetune:
        for where in _implausible(report.finetune):
            raise Refused(400, f"finetune.{where} is not what this field holds")
    return report


def stock_count(report: ProgressReport, name: str) -> int | None:
    """A whole number that a stock callback sends as a metric."""
    value = _stock_number(report, name)
    return int(value) if value is not None and 0 <= value <= _COUNT_MAX else None


def stock_epoch(report: ProgressReport) -> str | None:
    """Passes over the data as a stock callback sends them."""
    value = _stock_number(report, EPOCH_METRIC)
    return f"{value:.6g}" if value is not None and value >= 0 else None


def _stock_number(report: ProgressReport, name: str) -> float | None:
    for metric in report.trainerStatus.metrics:
        if metric.name == name:
            number = decimal(metric.value)
            if number is not None and math.isfinite(float(number)):
                return float(metric.value)
    return None


def _implausible(run: RunReport) -> Iterator[str]:
    for name in ("attempt", "step", "total_steps", "first_step", "tokens_per_second", "longest_save_seconds"):
        value = getattr(run, name)
        if value is not None and not 0 <= value <= _COUNT_MAX:
            yield _wire(name)
    if run.epoch is not None and decimal(run.epoch) is None:
        yield "epoch"
    if run.checkpoints:
        yield from (f"checkpoints.{where}" for where in _implausible_checkpoints(run.checkpoints))
    if run.inputs:
        yield from (f"inputs.{where}" for where in _implausible_inputs(run.inputs))


def _implausible_checkpoints(checkpoints: CheckpointsStatus) -> Iterator[str]:
    for which in ("latest", "best"):
        checkpoint = getattr(checkpoints, which)
        if checkpoint is None:
            continue
        if not 0 <= checkpoint.step <= _COUNT_MAX:
            yield f"{which}.step"
        if not _PLACE.fullmatch(checkpoint.uri):
            yield f"{which}.uri"
        if not _IDENTIFIER.fullmatch(checkpoint.digest):
            yield f"{which}.digest"
        if not _is_time(checkpoint.time):
            yield f"{which}.time"
        if checkpoint.metric and not metrics([checkpoint.metric]):
            yield f"{which}.metric"


_INPUT_COUNTS = (
    "rows", "evaluation_rows", "tokens", "truncated_rows", "dropped_rows", "duplicate_rows", "leaked_rows",
)  # fmt: skip


def _implausible_inputs(inputs: Inputs) -> Iterator[str]:
    for name in ("model_digest", "dataset_digest"):
        value = getattr(inputs, name)
        if value is not None and not _IDENTIFIER.fullmatch(value):
            yield _wire(name)
    for name in _INPUT_COUNTS:
        value = getattr(inputs, name)
        if value is not None and not 0 <= value <= _COUNT_MAX:
            yield _wire(name)


def _is_time(text: str) -> bool:
    try:
        return "T" in text and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _wire(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)
