"""The steps of decide.py while an attempt is open: its Job is made, runs or waits, is stopped and resumed, is replaced."""

from finetune_crds.names import ConditionType as C
from finetune_crds.names import Reason
from finetune_crds.v1alpha1 import Attempt, Failure

from . import attempts, endings, evidence, specs, waiting
from .clock import read, seconds_between
from .conditions import drop, holds, reason_of
from .results import book_waiting, take_over
from .turn import DEADLINE, EDIT, POLL, SETTLE, STOPPING, Turn
from .views import JobView, PodView

_MEET = (
    "Look in the pods' logs at what keeps the ranks apart (a network policy, NCCL's choice of interface, a "
    "resources.sharedMemory too small, inputs that take over two hours to prepare), and apply the manifest again."
)


def step(turn: Turn, attempt: Attempt) -> None:
    """One step of the open attempt; it may end it."""
    seen = turn.seen
    job = seen.jobs.get(attempt.job_name)
    if job is None:
        _without_job(turn, attempt)
        return
    pods = [pod for pod in seen.pods if pod.job_name == job.name]
    fruitless = _book_runs(turn, attempt, pods)
    lost = next((pod for pod in pods if pod.uid in seen.lost), None)
    over_limits = evidence.over_limits(pods)
    if job.ended:
        endings.step(turn, attempt, job, pods)
    elif job.deleting:
        turn.decision.look_again(POLL)
    elif _edited(turn, attempt):
        turn.tell(Reason.EDITED, f"Edited before training began: Job {job.name} is replaced.")
        turn.spend(job)
        attempts.close(turn.status, attempt, "Stopped", None, end=turn.now)
    elif lost:
        turn.tell(Reason.DISRUPTED, f"Node {lost.node} is lost: Job {job.name} is replaced.", warning=True)
        turn.say(C.RUNNING, False, Reason.DISRUPTED, f"Node {lost.node} is lost.")
        turn.spend(job)
        attempts.close(turn.status, attempt, "Stopped", "NodeLost", end=turn.now)
    elif over_limits:
        turn.spend(job)
        turn.fail_attempt(attempt, over_limits)
    elif fruitless:  # the Job itself would replace the pods for ever
        turn.spend(job)
        endings.count_failure(turn, attempt, fruitless, turn.now)
    elif seen.unshared and attempt.start_time is None:
        refuse_unshared(turn, attempt)
        turn.decision.delete.append(job)
    elif seen.suspend or turn.deadline_left(job) <= 0:
        _stop(turn, attempt, job, pods)
    elif job.suspended:
        _resume(turn, attempt, job)
    else:
        _watch(turn, attempt, job, pods)


def refuse_unshared(turn: Turn, attempt: Attempt) -> None:
    """Several nodes cannot mount a claim of one."""
    unshared = turn.seen.unshared
    assert unshared is not None
    message = (
        f"resources.nodes is {turn.status.resolved and turn.status.resolved['resources']['nodes']}, but claim "
        f"{unshared.claim} cannot be mounted by several nodes: its access modes are {', '.join(unshared.modes)}."
    )
    advice = "Use a claim with ReadWriteMany (for inputs ReadOnlyMany does), or one node, and apply the manifest again."
    failure = Failure(cause="UserError", message=message, next_step=advice)
    turn.fail_attempt(attempt, failure, reason=Reason.VOLUME_NOT_SHARED)


def _edited(turn: Turn, attempt: Attempt) -> bool:
    """Pods would look otherwise now, and nothing is lost by replacing them: training has not begun."""
    return attempt.template_digest != turn.template and not holds(turn.status, C.SPEC_FROZEN)


def _without_job(turn: Turn, attempt: Attempt) -> None:
    """Its Job was not made yet, or somebody deleted it."""
    refused = turn.seen.refused
    if attempt.start_time is not None:
        note = f"Job {attempt.job_name} was deleted, not by the operator: another takes its place."
        turn.tell(Reason.DISRUPTED, note, warning=True)
        attempts.close(turn.status, attempt, "Stopped", "Disruption", end=turn.now)
    elif turn.seen.suspend or _edited(turn, attempt):
        attempts.close(turn.status, attempt, "Stopped", None, end=turn.now)
    elif refused and refused.lasting:
        message = f"The API server refuses the attempt's children: {refused.message}"
        turn.fail_attempt(attempt, Failure(cause="UserError", message=message[:2048], next_step=EDIT))
    elif turn.deadline_left(None) <= seconds_between(attempt.recorded_time, turn.now):
        attempts.close(turn.status, attempt, "Failed", "DeadlineExceeded", end=turn.now)
        turn.fail_by_deadline()
    else:
        if refused:
            turn.wait_for(waiting.refused(refused.message))
        try:
            turn.decision.create = specs.plan_pinned(turn.seen, attempt, turn.status)
        except specs.InvalidSpec as error:
            turn.fail_attempt(attempt, Failure(cause="UserError", message=str(error), next_step=EDIT))
            return
        turn.decision.look_again(SETTLE)


def _watch(turn: Turn, attempt: Attempt, job: JobView, pods: list[PodView]) -> None:
    """It runs, or the status says why it does not."""
    status, decision = turn.status, turn.decision
    if turn.seen.active_deadline:
        decision.look_again(turn.deadline_left(job) + 0.5)
    if attempt.template_digest != turn.template and status.observed_generation != turn.seen.generation:
        note = "The edit takes effect with its next pods: suspend and resume it to have them now."
        turn.tell(Reason.EDITED, note, turn=turn.seen.generation)
    alive = [pod for pod in pods if not pod.ended and pod.deleted is None]
    running = {pod.index for pod in alive if pod.running}
    arrived = {pod.index for pod in pods if pod.exit_code == 0}
    if running and len(running | arrived) >= turn.seen.nodes:
        if not holds(status, C.RUNNING):
            turn.tell(Reason.PODS_RUNNING, f"Run {attempt.runs} of attempt {attempt.number} begins.", turn=attempt.runs)
            book_waiting(status, turn.seen.created, turn.now)
        drop(status, C.WAITING, C.RECONCILING, C.SUSPENDED)
        turn.say(C.RUNNING, True, Reason.PODS_RUNNING, "Every pod of the attempt runs.")
        turn.say(C.SPEC_FROZEN, True, Reason.TRAINING, "What decides the outcome is fixed while it trains.")
        return
    starting = [pod for pod in alive if not pod.running]
    if holds(status, C.RUNNING) and starting:
        turn.say(C.RUNNING, False, Reason.DISRUPTED, "Pods were taken away and are being replaced.")
    turn.explain_start(job, starting)


def _stop(turn: Turn, attempt: Attempt, job: JobView, pods: list[PodView]) -> None:
    """Suspends the Job, whose pods get SIGTERM and save; what follows begins when they are gone."""
    status, late = turn.status, not turn.seen.suspend
    if reason_of(status, C.SUSPENDED) not in STOPPING:
        turn.spend(job)
        turn.tell(Reason.SUSPENDING, "Saving a checkpoint, then freeing the GPUs.", turn=turn.seen.generation)
    if not holds(status, C.SUSPENDED):
        reason = DEADLINE if late else Reason.SUSPENDING
        turn.say(C.SUSPENDED, False, reason, "Pods are saving and ending.")
    if not job.suspended:
        turn.decision.suspend = (job, True)
        turn.decision.look_again(SETTLE)
        return
    holding = any(not pod.ended and pod.uid not in turn.seen.lost for pod in pods)
    if job.terminating or job.active or holding:
        turn.decision.look_again(POLL)
        return
    for pod in pods:
        if pod.uid == attempt.run_id:  # its last words may be newer than what it reported
            take_over(status, attempt, evidence.verdict_of(pod))
    attempts.end_run(status, attempt, end=max((read(pod.finished) for pod in pods if pod.finished), default=turn.now))
    if late:
        attempts.close(status, attempt, "Failed", "DeadlineExceeded", end=turn.now)
        turn.fail_by_deadline()
        turn.decision.delete.append(job)
    elif not holds(status, C.SUSPENDED):
        attempts.count(status, "Suspended")
        drop(status, C.WAITING, C.RECONCILING)
        turn.say(C.RUNNING, False, Reason.SUSPENDED, "Suspended.")
        turn.say(C.SUSPENDED, True, Reason.SUSPENDED, "spec.suspend is true, and no pod runs.")
        turn.tell(Reason.SUSPENDED, "Its GPUs are free.", turn=turn.seen.generation)


def _resume(turn: Turn, attempt: Attempt, job: JobView) -> None:
    """Continues in the same Job, or in a new one when an edit has changed its pods."""
    if attempt.template_digest != turn.template:
        attempts.close(turn.status, attempt, "Stopped", "Suspended", end=turn.now)
        return
    if reason_of(turn.status, C.SUSPENDED) != Reason.RESUMED:
        turn.tell(Reason.RESUMED, "Continuing from the last checkpoint.", turn=turn.seen.generation)
    turn.say(C.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false.")
    turn.decision.suspend = (job, False)
    turn.decision.look_again(SETTLE)


def _book_runs(turn: Turn, attempt: Attempt, pods: list[PodView]) -> Failure | None:
    """Another first pod is another run; why the one before ended is counted in the same write.

    Returns:
        Why that one failed, when it is no disruption though the Job takes it for one: see _fruitless.
    """
    started = sorted((pod for pod in pods if pod.index == 0 and pod.running_since), key=lambda pod: pod.created)
    if not started or started[-1].uid == attempt.run_id:
        return None
    failure, since = None, attempt.run_start_time
    if attempt.run_id and since:  # else it was suspended, and is counted
        ended = [pod for pod in pods if pod.ended and (pod.finished or pod.deleted or since) >= since]
        findings = [evidence.of_pod(pod, is_program=turn.seen.is_program) for pod in ended]
        before = next((pod for pod in started if pod.uid == attempt.run_id), None)
        if before:
            take_over(turn.status, attempt, evidence.verdict_of(before))
        own = evidence.of_pod(before, is_program=turn.seen.is_program).cause if before else "Disruption"
        peers = {finding.cause for finding in findings} - {"PeerLost"}
        cause = "Disruption" if own == "PeerLost" and "Disruption" in peers else own
        if cause == "PeerLost" and before:
            failure = _fruitless(before, pods)
        if failure is None:
            attempts.count(turn.status, cause)
        note = f"Run {attempt.runs} ended ({cause}); run {(attempt.runs or 0) + 1} continues from the last checkpoint."
        turn.tell(Reason.DISRUPTED, note, turn=attempt.runs, warning=True)
    attempts.start_run(turn.status, attempt, started[-1], now=turn.now)
    attempt.image = started[-1].image[:512] or attempt.image
    return failure


def _fruitless(before: PodView, pods: list[PodView]) -> Failure | None:
    """Ranks that lose each other before they have done a step, with no pod taken away and none missing, will do so again."""
    verdict = evidence.verdict_of(before)
    if verdict is None or verdict.step > verdict.first_step or any(p.unschedulable for p in pods if not p.ended):
        return None
    message = f"{verdict.message or 'The ranks lost each other'}: before the first step, and no pod was taken away."
    return Failure(cause="PeerLost", exit_code=before.exit_code, message=message, next_step=_MEET)
