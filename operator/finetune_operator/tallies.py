"""What a status write brought to its end, into the counters. act.py calls it after each write that succeeded, so each end counts once."""

from finetune_crds.names import ConditionType
from finetune_crds.v1alpha1 import FineTuneJobStatus

from .clock import seconds_between
from .conditions import holds
from .metrics import Metrics


def tally(metrics: Metrics, before: FineTuneJobStatus, after: FineTuneJobStatus) -> None:
    """Counts the difference of two statuses."""
    known = {each.cause: each.count for each in before.cause_counts or ()}
    for each in after.cause_counts or ():
        if (more := each.count - known.get(each.cause, 0)) > 0:
            metrics.attempts.labels(cause=each.cause).inc(more)
    waited = after.usage.waiting_seconds if after.usage else None
    if waited is not None and not (before.usage and before.usage.waiting_seconds is not None):
        metrics.queue_seconds.observe(waited)
    open_before = {each.number for each in before.attempts or () if each.end_time is None}
    for attempt in after.attempts or ():
        if attempt.number in open_before and attempt.outcome:
            metrics.gpu_seconds.labels(outcome=attempt.outcome).inc(attempt.gpu_seconds or 0)
            if attempt.outcome == "Finished":
                metrics.attempts.labels(cause="Finished").inc()
    check = after.preflight
    if check and check.state in ("Passed", "Failed") and check.start_time and check.completion_time:
        known_end = before.preflight and (before.preflight.number, before.preflight.state)
        if known_end != (check.number, check.state):
            spent = seconds_between(check.start_time, check.completion_time)
            metrics.preflight_seconds.labels(result=check.state).observe(spent)
    first = next((each.start_time for each in after.attempts or () if each.start_time), None)
    for result in (ConditionType.COMPLETE, ConditionType.FAILED):
        if holds(after, result) and not holds(before, result) and first and after.completion_time:
            metrics.train_seconds.labels(result=result.value).observe(seconds_between(first, after.completion_time))
