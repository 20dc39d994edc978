"""The steps of decide.py when an attempt's Job has ended: complete only with a record that says so, else by cause."""

from datetime import datetime

from finetune_crds.names import ConditionType as C
from finetune_crds.names import Reason
from finetune_crds.v1alpha1 import Attempt, Failure
from finetune_crds.verdict import Verdict

from . import attempts, evidence, results
from .clock import read, stamp
from .conditions import reason_of
from .turn import DEADLINE, Turn
from .views import JobView, PodView

_NO_VERDICT = "Of our trainer this is a fault: please report it with the pod's log. A program of your own must not end with 0 early."


def step(turn: Turn, attempt: Attempt, job: JobView, pods: list[PodView]) -> None:
    """Closes the attempt; the job completes, fails, or goes on with another attempt."""
    end = read(job.complete or job.failed or stamp(turn.now))
    turn.spend(job)
    if job.complete:
        verdict = evidence.finished_verdict(pods)
        if verdict or results.reported_finished(turn.status, attempt):
            _complete(turn, attempt, verdict, end)
            return
        message = f"Job {job.name} is Complete, but no record says that training reached its end."
        failure = Failure(cause="NoVerdict", exit_code=0, message=message, next_step=_NO_VERDICT)
        turn.fail_attempt(attempt, failure, end=end)
        return
    finding = evidence.of_job(job, pods, is_program=turn.seen.is_program)
    results.take_over(turn.status, attempt, finding.verdict)
    if turn.seen.suspend or reason_of(turn.status, C.SUSPENDED) == DEADLINE:
        attempts.close(turn.status, attempt, "Stopped", "Suspended", end=end)
    elif finding.policy == "FailJob":
        turn.fail_attempt(attempt, finding.failure, end=end)
    elif finding.policy == "Ignore":
        attempts.close(turn.status, attempt, "Stopped", finding.cause, end=end)
        turn.say(C.RUNNING, False, Reason.DISRUPTED, finding.failure.message)
        turn.tell(Reason.DISRUPTED, finding.failure.message, warning=True)
    else:
        count_failure(turn, attempt, finding.failure, end)


def _complete(turn: Turn, attempt: Attempt, verdict: Verdict | None, end: datetime) -> None:
    status = turn.status
    attempts.close(status, attempt, "Finished", None, end=end)
    results.finish(turn, attempt, verdict)
    status.completion_time = stamp(end)
    turn.end_conditions()
    reused = bool(status.output and status.output.reused)
    reason = Reason.OUTPUT_REUSED if reused else Reason.COMPLETED
    said = "The output was there already, from an equal job" if reused else "Training has reached its end"
    said += f": {status.output.uri}" if status.output else "."
    turn.say(C.COMPLETE, True, reason, said)
    turn.say(C.SPEC_FROZEN, True, Reason.COMPLETED, "What decides the outcome is fixed: it is in the output.")
    turn.tell(reason, said)


def count_failure(turn: Turn, attempt: Attempt, failure: Failure, end: datetime) -> None:
    """It may pass: tried again as often as spec.retries says."""
    failures = (turn.status.counted_failures or 0) + 1
    turn.status.counted_failures = failures
    if failures > turn.seen.retries:
        turn.fail_attempt(attempt, failure, end=end)
        return
    attempts.close(turn.status, attempt, "Failed", failure.cause, end=end)
    turn.say(C.RUNNING, False, Reason.RETRYING, failure.message)
    left = turn.seen.retries - failures
    turn.tell(Reason.RETRYING, f"{failure.cause}: {failure.message} Retries left after this one: {left}.", warning=True)
