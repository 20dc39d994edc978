"""The list of attempts in status: opened before any child exists, closed with a cause, capped; and what their GPUs cost.

Within an attempt a run is one life of the pod with index 0. `run_id` and `run_start_time` make counting runs and GPU-seconds
independent of which pods can still be seen: a run is booked once, when it is over, in the same write that records its end.
"""

from datetime import datetime
from typing import Literal

from finetune_crds.v1alpha1 import ATTEMPTS_MAX, Attempt, Cause, CauseCount, FineTuneJobStatus, Usage

from .clock import read, seconds_between, stamp
from .views import PodView

Outcome = Literal["Finished", "Failed", "Stopped"]


def latest(status: FineTuneJobStatus) -> Attempt | None:
    """The attempt with the highest number."""
    return status.attempts[-1] if status.attempts else None


def current(status: FineTuneJobStatus) -> Attempt | None:
    """The attempt that has not ended."""
    last = latest(status)
    return last if last and last.end_time is None else None


def add(status: FineTuneJobStatus, attempt: Attempt) -> None:
    """Appends an attempt; of many the first and last ten are kept (a longer list would have the whole status refused)."""
    listed = [*(status.attempts or ()), attempt]
    half = ATTEMPTS_MAX // 2
    status.attempts = listed if len(listed) <= ATTEMPTS_MAX else listed[:half] + listed[-half:]


def close(status: FineTuneJobStatus, attempt: Attempt, outcome: Outcome, cause: Cause | None, *, end: datetime) -> None:
    """Ends an attempt and books what it cost."""
    end_run(status, attempt, end=end)
    attempt.end_time = stamp(end)
    attempt.outcome = outcome
    attempt.cause = cause
    if cause:
        count(status, cause)
    if outcome == "Failed" and attempt.gpu_seconds:
        usage = status.usage or Usage()
        usage.lost_gpu_seconds = (usage.lost_gpu_seconds or 0) + attempt.gpu_seconds
        status.usage = usage


def start_run(status: FineTuneJobStatus, attempt: Attempt, pod: PodView, *, now: datetime) -> None:
    """Records that a pod trains that is not the one recorded."""
    since = pod.scheduled or pod.running_since or stamp(now)
    end_run(status, attempt, end=read(pod.created))
    attempt.runs = (attempt.runs or 0) + 1
    attempt.run_id = pod.uid
    attempt.run_start_time = since
    attempt.start_time = attempt.start_time or since


def end_run(status: FineTuneJobStatus, attempt: Attempt, *, end: datetime) -> None:
    """Books the GPU-seconds of the run in progress, if there is one."""
    if attempt.run_start_time is None:
        return
    held = round(seconds_between(attempt.run_start_time, end) * (status.gpus or 0))
    attempt.run_start_time = None
    attempt.gpu_seconds = (attempt.gpu_seconds or 0) + held
    usage = status.usage or Usage()
    usage.gpu_seconds = (usage.gpu_seconds or 0) + held
    status.usage = usage


def count(status: FineTuneJobStatus, cause: Cause) -> None:
    """Counts the end of a run or an attempt by its cause."""
    counts = {each.cause: each.count for each in status.cause_counts or ()}
    counts[cause] = counts.get(cause, 0) + 1
    status.cause_counts = [CauseCount(cause=cause, count=number) for cause, number in counts.items()]
