"""The final word of a run into status: from the termination message, or from what the progress server wrote when that was lost."""

from datetime import datetime

from finetune_crds.v1alpha1 import (
    Attempt,
    FineTuneJobStatus,
    OutputStatus,
    Progress,
    Usage,
)
from finetune_crds.verdict import ExitCode, Verdict

from . import figures
from .clock import seconds_between, stamp
from .turn import Turn


def reported_finished(status: FineTuneJobStatus, attempt: Attempt) -> bool:
    """Whether this attempt's trainer has reported its end: kubelets lose termination messages when a node dies."""
    progress = status.progress
    return progress is not None and progress.attempt == attempt.number and progress.stage == "Finished"


def finish(turn: Turn, attempt: Attempt, verdict: Verdict | None) -> None:
    """Training has reached its end."""
    status = turn.status
    take_over(status, attempt, verdict)
    progress = status.progress or Progress(attempt=attempt.number)
    steps = f" ({progress.step}/{progress.total_steps})" if progress.step and progress.total_steps else ""
    status.progress = progress.model_copy(
        update={
            "stage": "Finished",
            "percentage": 100,
            "display": f"100 %{steps}",
            "estimated_completion_time": None,
            "last_report_time": stamp(turn.now),
        }
    )
    output = turn.seen.spec.get("output")
    if status.output is None and output:
        status.output = OutputStatus(uri=output["uri"])
    if not status.usage or status.usage.waiting_seconds is None:
        book_waiting(status, turn.seen.created, attempt.start_time or turn.now)


def take_over(status: FineTuneJobStatus, attempt: Attempt, verdict: Verdict | None) -> None:
    """The record of an ended run takes the place of what was reported on the way; what it leaves out stays as reported."""
    if verdict is None:
        if status.progress and status.progress.attempt == attempt.number:
            attempt.last_step = status.progress.step
        return
    attempt.first_step, attempt.last_step = verdict.first_step, verdict.step
    status.checkpoints = verdict.checkpoints or status.checkpoints
    if verdict.longest_save_seconds and status.checkpoints:
        longest = max(verdict.longest_save_seconds, status.checkpoints.longest_save_seconds or 0)
        status.checkpoints.longest_save_seconds = longest
    status.inputs = verdict.inputs or status.inputs
    if verdict.evaluation:
        status.evaluation = figures.evaluation(verdict.evaluation)
    if verdict.code == ExitCode.FINISHED:
        status.output = verdict.output or status.output
    if verdict.metrics:
        status.metrics = figures.latest(status.metrics or (), figures.metrics(verdict.metrics))
    if verdict.total_steps:
        percentage = min(100, 100 * verdict.step // verdict.total_steps)
        status.progress = (status.progress or Progress()).model_copy(
            update={
                "attempt": attempt.number,
                "step": verdict.step,
                "total_steps": verdict.total_steps,
                "percentage": percentage,
                "display": f"{percentage} % ({verdict.step}/{verdict.total_steps})",
                "tokens_per_second": verdict.tokens_per_second,
                "estimated_completion_time": None,
            }
        )


def book_waiting(status: FineTuneJobStatus, created: str, running: datetime | str) -> None:
    """From creation until all training pods ran."""
    usage = status.usage or Usage()
    if usage.waiting_seconds is None:
        usage.waiting_seconds = round(seconds_between(created, running))
    status.usage = usage
