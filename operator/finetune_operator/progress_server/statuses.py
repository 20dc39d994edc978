"""Report + status as last seen -> the status fields that finetune-progress owns. Pure; the writer and its tests call it."""

from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from finetune_crds.progress import ProgressReport
from finetune_crds.v1alpha1 import Metric, Progress

from .. import figures
from ..kube import Json
from . import reports
from .runs import Run

_CARRIED: Final = ("checkpoints", "inputs", "evaluation")
"""An apply that leaves out a field of its own deletes it, so each apply carries what was known before."""

_LONGEST: Final = timedelta(days=3650)
_NOT_METRICS = (reports.STEP_METRIC, reports.TOTAL_METRIC, reports.EPOCH_METRIC)


class Reported(NamedTuple):
    """One accepted POST."""

    run: Run
    report: ProgressReport
    at: datetime


def fold(earlier: Reported, later: Reported) -> Reported:
    """Both as one report: the later one, with what only the earlier one knew."""
    if earlier.run.pod != later.run.pod:
        return later
    if _is_behind(later.report, earlier.report):  # two connections, overtaken on the way
        earlier, later = later._replace(at=max(earlier.at, later.at)), earlier._replace(at=max(earlier.at, later.at))
    report = later.report.model_copy(deep=True)
    named = {metric.name for metric in report.trainerStatus.metrics}
    report.trainerStatus.metrics += [m for m in earlier.report.trainerStatus.metrics if m.name not in named]
    if report.finetune and earlier.report.finetune:
        for field in (*_CARRIED, "tokens_per_second", "epoch"):
            if getattr(report.finetune, field) is None:
                setattr(report.finetune, field, getattr(earlier.report.finetune, field))
    return later._replace(report=report)


def advance(status: Json, reported: Reported) -> Json | None:
    """The fields to apply over `status`; None when status is already ahead.

    Order is (attempt, step). Within an attempt a pod made after the last report is a new run, which starts at its
    checkpoint: the steps that were lost with its predecessor are no longer done, so there the step may fall.
    """
    run, report, _ = reported
    before: Json = status.get("progress") or {}
    if before.get("attempt", 0) > run.attempt:
        return None
    same_run = before.get("attempt") == run.attempt and not _is_new_run(before, run)
    known = before if same_run else {}
    if _step(report, known) < known.get("step", 0) or _percentage(report, known) < known.get("percentage", 0):
        return None
    after: Json = {"progress": _progress(reported, known).to_wire()}
    same_attempt = before.get("attempt") == run.attempt
    earlier = [Metric(**m) for m in status.get("metrics") or ()] if same_attempt else []
    told = [m for m in figures.metrics(report.trainerStatus.metrics) if m.name not in _NOT_METRICS]
    after["metrics"] = [metric.to_wire() for metric in figures.latest(earlier, told)]
    ours = report.finetune
    carried = status if _same_outcome(status, before.get("attempt"), run.attempt) else {}
    for field in _CARRIED:
        given = getattr(ours, field) if ours else None
        if field == "evaluation" and given:
            given = figures.evaluation(given)
        merged = {**(carried.get(field) or {}), **(given.to_wire() if given else {})}
        if field == "checkpoints" and ours and ours.longest_save_seconds:
            merged["longestSaveSeconds"] = max(ours.longest_save_seconds, merged.get("longestSaveSeconds") or 0)
        if merged:
            after[field] = merged
    return after


def is_urgent(status: Json, after: Json) -> bool:
    """Whether `after` tells what must not wait: a first report, a first step, a checkpoint, an evaluation, the end.

    A stock callback tells no step at its beginning and none at its end, and each of its POSTs may reach another replica.
    """
    before: Json = status.get("progress") or {}
    now: Json = after["progress"]
    return (
        (before.get("attempt"), before.get("pod")) != (now["attempt"], now["pod"])
        or ("step" in now and "step" not in before)
        or (now.get("stage") == "Finished" and before.get("stage") != "Finished")
        or (now.get("percentage") == 100 and before.get("percentage") != 100)
        or any(status.get(field) != after.get(field) for field in ("checkpoints", "evaluation"))
    )


def _same_outcome(status: Json, before: int | None, now: int) -> bool:
    """Whether both attempts train the same thing: after an edit, checkpoints and inputs of the former are no longer ours."""
    digests = {attempt["number"]: attempt.get("specDigest") for attempt in status.get("attempts") or ()}
    return before is None or before == now or digests.get(before) == digests.get(now)


def _is_new_run(before: Json, run: Run) -> bool:
    last = before.get("lastReportTime")
    return before.get("pod") != run.pod and (last is None or run.pod_created >= datetime.fromisoformat(last))


def _step(report: ProgressReport, known: Json) -> int:
    if report.finetune:
        return report.finetune.step
    told = reports.stock_count(report, reports.STEP_METRIC)
    # At its end a stock callback tells 100 % and no step.
    return told if told is not None else int(known.get("step", 0))


def _is_behind(one: ProgressReport, other: ProgressReport) -> bool:
    told = {"step": _step(other, {}), "percentage": _percentage(other, {})}
    return _step(one, told) < told["step"] or _percentage(one, told) < told["percentage"]


def _percentage(report: ProgressReport, known: Json) -> int:
    ours = report.finetune
    if ours and ours.stage == "Finished":
        return 100
    if ours and ours.total_steps:
        return min(100, 100 * ours.step // ours.total_steps)
    told = report.trainerStatus.progressPercentage
    return told if told is not None else int(known.get("percentage", 0))


def _progress(reported: Reported, known: Json) -> Progress:
    run, report, now = reported
    ours, percentage = report.finetune, _percentage(report, known)
    told = reports.stock_count(report, reports.STEP_METRIC)
    total = ours.total_steps if ours else reports.stock_count(report, reports.TOTAL_METRIC) or known.get("totalSteps")
    step = _step(report, known) if ours or told is not None or "step" in known else None
    display = f"{percentage} %"
    if step is not None and total and (step == total or percentage < 100):
        display += f" ({step}/{total})"
    remaining = report.trainerStatus.estimatedRemainingSeconds
    finished = ours is not None and ours.stage == "Finished"
    done = None if remaining is None or finished else now + min(timedelta(seconds=min(remaining, 10**9)), _LONGEST)
    return Progress(
        attempt=run.attempt,
        pod=run.pod,
        stage=ours.stage if ours else "Training",
        step=step,
        total_steps=total or None,
        percentage=percentage,
        display=display,
        epoch=figures.decimal(ours.epoch) if ours else reports.stock_epoch(report) or known.get("epoch"),
        tokens_per_second=ours.tokens_per_second if ours else None,
        estimated_completion_time=_rfc3339(done) if done else None,
        last_report_time=_rfc3339(now),
    )


def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
