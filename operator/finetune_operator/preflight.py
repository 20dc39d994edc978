"""The steps of decide.py before an attempt, while what can be checked without a GPU is checked: a Job of one pod, recorded, made, followed.

It writes nothing that training reads, so it may be stopped and made again at any time; what it costs is no GPU's time and none of spec.retries.
"""

from datetime import datetime, timedelta

from finetune_crds.names import ConditionType as C
from finetune_crds.names import Reason
from finetune_crds.resolved import ResolvedJob
from finetune_crds.v1alpha1 import Cause, Failure, FineTuneJobStatus, Preflight, PreflightReport
from finetune_crds.verdict import Verdict

from . import attempts, evidence, specs, waiting
from .clock import read, seconds_between, stamp
from .conditions import drop, holds
from .decisions import Plan
from .identities import preflight_name
from .turn import EDIT, SETTLE, Turn
from .views import JobView, PodView

LOSSES = 10
"""Pods taken away, one after the other, after which something is wrong that waiting does not mend."""
BACKOFF, BACKOFF_MAX = 10.0, 300.0
"""Seconds before the first repetition, doubled for each further one."""


def current(status: FineTuneJobStatus) -> Preflight | None:
    """The one that has not ended."""
    check = status.preflight
    return check if check and check.state == "Running" else None


def last_template(status: FineTuneJobStatus) -> str | None:
    """Digest of the template of what was done last: an attempt, or the preflight of one that never began."""
    check, last = status.preflight, attempts.latest(status)
    if check and (last is None or check.attempt > last.number):
        return check.template_digest
    return last.template_digest if last else None


def pinned(turn: Turn) -> str | None:
    """Digest of what status.resolved pins, if that is what is to be done next: nothing has been edited since it was resolved."""
    if last_template(turn.status) != turn.template:
        return None
    check, last = turn.status.preflight, attempts.latest(turn.status)
    if check and (last is None or check.attempt > last.number):
        return check.spec_digest
    return (last.spec_digest if last else "") or None


def failed(status: FineTuneJobStatus) -> bool:
    """Whether it was the last thing done, and failed."""
    check, last = status.preflight, attempts.latest(status)
    return bool(check and check.state == "Failed" and (last is None or check.attempt > last.number))


def is_due(turn: Turn, job: ResolvedJob) -> bool:
    """Whether a job is to be checked before GPUs are asked for: it wants to be, and neither a preflight nor training has begun to do what it would do."""
    check = turn.status.preflight
    passed = check is not None and check.state == "Passed" and check.spec_digest == job.digest
    trained = holds(turn.status, C.SPEC_FROZEN)
    return job.spec.preflight == "Required" and not _skipped(turn) and not passed and not trained


def pause(turn: Turn) -> float:
    """Seconds until it may be repeated."""
    check = turn.status.preflight
    if (
        check is None
        or check.state != "Stopped"
        or check.completion_time is None
        or check.template_digest != turn.template
    ):
        return 0.0
    repeated = (check.losses or 0) + (check.failures or 0)
    if not repeated:
        return 0.0
    wait = timedelta(seconds=min(BACKOFF * 2 ** (repeated - 1), BACKOFF_MAX))
    return (read(check.completion_time) + wait - turn.now).total_seconds()


def begin(turn: Turn, job: ResolvedJob) -> None:
    """Write-ahead: it is in status before its Job exists."""
    seen, status, last = turn.seen, turn.status, attempts.latest(turn.status)
    before = status.preflight
    same = before is not None and before.state == "Stopped" and before.template_digest == turn.template
    number = before.number + 1 if before else 1
    name = preflight_name(seen.name, seen.uid, number)
    turn.status.preflight = Preflight(
        number=number,
        attempt=last.number + 1 if last else 1,
        generation=seen.generation,
        spec_digest=job.digest,
        template_digest=turn.template,
        job_name=name,
        state="Running",
        recorded_time=stamp(turn.now),
        losses=before.losses if before and same else None,
        failures=before.failures if before and same else None,
    )
    status.resolved = job.spec.to_wire()
    status.gpus = job.spec.resources.gpus
    status.start_time = status.start_time or stamp(turn.now)
    drop(status, C.SUSPENDED, C.WAITING)
    turn.say(C.RECONCILING, True, Reason.CREATED, f"Making Job {name}.")
    turn.say(C.RUNNING, False, Reason.PREFLIGHT_RUNNING, "No GPU is asked for before the preflight has passed.")
    turn.say(C.PREFLIGHT_PASSED, False, Reason.PREFLIGHT_RUNNING, f"Job {name} checks model, data and places.")
    turn.say(C.SPEC_FROZEN, False, Reason.NOT_STARTED, "Everything can be edited until training begins.")
    turn.tell(Reason.PREFLIGHT_RUNNING, f"Job {name} checks model, data and places without a GPU.", turn=f"p{number}")
    turn.decision.create = Plan(job, 0, specs.GRACE_PREFLIGHT, number)
    turn.decision.look_again(SETTLE)


def leave_out(turn: Turn) -> None:
    """Without a GPU its pod may land where none is, and a volume that is made for it stays there."""
    why = f"The volume of claim {turn.seen.unbound} is made where its first pod lands, which shall be one with a GPU; preflight: Required checks nevertheless."
    turn.say(C.PREFLIGHT_PASSED, False, Reason.PREFLIGHT_LEFT_OUT, why)
    turn.tell(Reason.PREFLIGHT_LEFT_OUT, why)


def step(turn: Turn, check: Preflight) -> None:
    """One step of the open preflight; it may end it. A Job that runs on behind a closed record is deleted by decide.py in the same pass."""
    check = turn.status.preflight = check.model_copy()
    seen = turn.seen
    job = seen.jobs.get(check.job_name)
    if job is None:
        _without_job(turn, check)
        return
    pods = [pod for pod in seen.pods if pod.job_name == job.name]
    started = [pod.running_since for pod in pods if pod.running_since]
    check.start_time = check.start_time or min(started, default=None)
    lost = next((pod for pod in pods if pod.uid in seen.lost), None)
    over_limits = evidence.over_limits(pods)
    if job.ended:
        turn.spend(job)
        _ended(turn, check, job, pods)
    elif job.deleting:  # not by the operator, which closes the record with the deletion
        _again(turn, check, f"Job {job.name} was deleted, not by the operator.", turn.now)
    elif seen.suspend or _edited(turn, check) or _skipped(turn):
        turn.spend(job)
        _stop(turn, check)
    elif turn.deadline_left(job) <= 0:
        turn.spend(job)
        _close(turn, check, "Stopped", turn.now)
        turn.fail_by_deadline()
    elif over_limits:
        turn.spend(job)
        _fail(turn, check, over_limits, turn.now)
    elif lost:
        turn.spend(job)
        _again(turn, check, f"Node {lost.node} of the preflight is lost.", turn.now)
    else:
        _watch(turn, job, pods)


def _without_job(turn: Turn, check: Preflight) -> None:
    """Its Job was not made yet, or somebody deleted it."""
    refused = turn.seen.refused
    if turn.seen.suspend or _edited(turn, check) or _skipped(turn):
        _stop(turn, check)
    elif check.start_time is not None:
        _again(turn, check, f"Job {check.job_name} was deleted, not by the operator.", turn.now)
    elif refused and refused.lasting:
        message = f"The API server refuses the children of the preflight: {refused.message}"
        _fail(turn, check, Failure(cause="UserError", message=message[:2048], next_step=EDIT), turn.now)
    elif turn.deadline_left(None) <= seconds_between(check.recorded_time, turn.now):
        _close(turn, check, "Stopped", turn.now)
        turn.fail_by_deadline()
    else:
        if refused:
            turn.wait_for(waiting.refused(refused.message))
        try:
            job = specs.pinned(turn.seen, check.spec_digest, check.template_digest, turn.status)
        except specs.InvalidSpec as error:
            _fail(turn, check, Failure(cause="UserError", message=str(error), next_step=EDIT), turn.now)
            return
        turn.decision.create = Plan(job, 0, specs.GRACE_PREFLIGHT, check.number)
        turn.decision.look_again(SETTLE)


def _watch(turn: Turn, job: JobView, pods: list[PodView]) -> None:
    """It runs, or the status says why it does not."""
    status, decision = turn.status, turn.decision
    if turn.seen.active_deadline:
        decision.look_again(turn.deadline_left(job) + 0.5)
    alive = [pod for pod in pods if not pod.ended and pod.deleted is None]
    if any(pod.running for pod in alive):
        drop(status, C.WAITING, C.RECONCILING, C.SUSPENDED)
        return
    turn.explain_start(job, alive)


def _ended(turn: Turn, check: Preflight, job: JobView, pods: list[PodView]) -> None:
    end = read(job.complete or job.failed or stamp(turn.now))
    if job.complete:
        verdict = evidence.finished_verdict(pods)
        if verdict is None or verdict.preflight is None:
            _again(turn, check, f"Job {job.name} is Complete, but no record says what it found.", end, counts=True)
        else:
            _pass(turn, check, verdict, verdict.preflight, end)
        return
    finding = evidence.of_job(job, pods, is_program=False)
    if finding.policy == "FailJob":
        _fail(turn, check, finding.failure, end)
    elif finding.policy == "Ignore":
        _again(turn, check, finding.failure.message, end)
    else:
        _again(turn, check, finding.failure.message, end, counts=True, failure=finding.failure)


def _pass(turn: Turn, check: Preflight, verdict: Verdict, report: PreflightReport, end: datetime) -> None:
    _close(turn, check, "Passed", end)
    check.report = report
    turn.status.inputs = verdict.inputs or turn.status.inputs
    said = f"{report.rows} rows, {report.steps} steps"
    if memory := report.memory:
        said += f", at least {memory.total} of each GPU"
        said += f" and {memory.full_speed} for full speed" if memory.full_speed else ""
    said += "."
    drop(turn.status, C.WAITING)
    turn.say(C.PREFLIGHT_PASSED, True, Reason.PREFLIGHT_PASSED, said)
    turn.tell(Reason.PREFLIGHT_PASSED, said, turn=f"p{check.number}")


def _fail(turn: Turn, check: Preflight, failure: Failure, end: datetime) -> None:
    """The job has failed, and no GPU was asked for."""
    _close(turn, check, "Failed", end)
    turn.say(C.PREFLIGHT_PASSED, False, Reason.PREFLIGHT_FAILED, failure.message)
    turn.fail(failure)


def _again(
    turn: Turn, check: Preflight, why: str, end: datetime, *, counts: bool = False, failure: Failure | None = None
) -> None:
    """What ended it is no fault of the job's, or may pass: repeated, in a new Job, but not for ever."""
    if counts:
        check.failures = (check.failures or 0) + 1
        over = check.failures > turn.seen.retries
    else:
        check.losses = (check.losses or 0) + 1
        over = check.losses > LOSSES
    if over:
        advice = "Look at the node's events: something takes the pod away each time. Then set the annotation finetune.dev/retry."
        cause: Cause = "NoVerdict" if counts else "Disruption"
        _fail(turn, check, failure or Failure(cause=cause, message=why[:2048], next_step=advice), end)
        return
    _close(turn, check, "Stopped", end)
    turn.say(C.PREFLIGHT_PASSED, False, Reason.PREFLIGHT_LOST, why)
    turn.tell(Reason.PREFLIGHT_LOST, f"The preflight is repeated: {why}", turn=f"p{check.number}", warning=True)


def _stop(turn: Turn, check: Preflight) -> None:
    """By the user: it begins anew when it is wanted again, and nothing counts."""
    _close(turn, check, "Stopped", turn.now)
    check.losses = check.failures = None
    drop(turn.status, C.PREFLIGHT_PASSED)
    if _edited(turn, check):
        turn.tell(
            Reason.EDITED, f"Edited during the preflight: Job {check.job_name} is replaced.", turn=f"p{check.number}"
        )


def _close(turn: Turn, check: Preflight, state: str, end: datetime) -> None:
    check.state = state  # type: ignore[assignment]
    check.completion_time = stamp(end)


def _edited(turn: Turn, check: Preflight) -> bool:
    return check.template_digest != turn.template


def _skipped(turn: Turn) -> bool:
    return turn.seen.spec.get("preflight") == "Skip"
