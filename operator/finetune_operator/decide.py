"""What should be, from what was seen: (Seen, clock, defaults) -> Decision. Pure; reconcile.py calls it, table tests cover it.

    finished?   clean up in time, or start over after a retry or an edit
    preflight   preflight.py: what needs no GPU is checked, before an attempt asks for any
    attempt     during.py: its Job is made, runs, is stopped; endings.py: it has ended
    no attempt  wait (suspension, back-off, pods that are still ending), else record the next one

Status is written before children are made or deleted, so each of these may be the last thing that a killed operator did.
"""

from datetime import datetime, timedelta

from finetune_crds.names import ConditionType as C
from finetune_crds.names import Reason
from finetune_crds.resolution import Defaults
from finetune_crds.v1alpha1 import Attempt, Failure

from . import attempts, during, preflight, specs, upstream
from .clock import read, seconds_between, stamp
from .conditions import drop, has_ended, holds, observe_generation, phase
from .decisions import Decision, Plan
from .identities import child_name
from .seen import Seen
from .turn import EDIT, POLL, SETTLE, Turn
from .views import JobView

BACKOFF, BACKOFF_MAX = 10.0, 300.0
"""Seconds before the first retry, doubled for each further one."""


def decide(seen: Seen, now: datetime, defaults: Defaults) -> Decision:
    """One pass over one FineTuneJob."""
    turn = Turn(seen, now, defaults)
    if seen.deleting:  # owner references and the garbage collector do the rest
        return turn.decision
    if not has_ended(turn.status) or _starts_over(turn):
        if attempt := attempts.current(turn.status):
            during.step(turn, attempt)
        elif check := preflight.current(turn.status):
            preflight.step(turn, check)
        is_open = attempts.current(turn.status) or preflight.current(turn.status)
        if not is_open and not has_ended(turn.status):
            _between(turn)
    if has_ended(turn.status):
        _clean_up(turn)
    observe_generation(turn.status, seen.generation)
    turn.status.phase = phase(turn.status)
    return turn.decision


def _starts_over(turn: Turn) -> bool:
    """After a failure a new value of the retry annotation, or an edit, tries again. A complete job never trains again."""
    status, retry = turn.status, turn.seen.retry
    last = preflight.last_template(status)
    edited = last is not None and last != turn.template
    edited |= preflight.failed(status) and turn.seen.spec.get("preflight") == "Skip"
    if holds(status, C.COMPLETE) or not (edited or (retry and retry != status.retry_handled)):
        return False
    drop(status, C.FAILED, C.STALLED)
    status.failure = status.completion_time = status.counted_failures = status.active_seconds = None
    status.retry_handled = retry or None
    if edited:
        turn.tell(Reason.EDITED, "Edited after a failure: trying again.", turn=turn.seen.generation)
    else:
        turn.tell(Reason.RETRYING, "Trying again, as the annotation asks.", turn=retry)
    return True


def _clean_up(turn: Turn) -> None:
    """Removes the children of a finished job when their time has come; its record stays."""
    after = turn.seen.spec.get("cleanup", {}).get("afterSeconds")
    jobs = [job for job in turn.seen.jobs.values() if not job.deleting and job not in turn.decision.delete]
    if running := [job for job in jobs if not job.ended]:  # it ended otherwise, or a deletion did not come about
        turn.decision.delete += running
        turn.decision.look_again(POLL)
        return
    if after is None or not jobs or turn.status.completion_time is None:
        turn.decision.settled = True
        return
    left = after - seconds_between(turn.status.completion_time, turn.now)
    if left > 0:
        turn.decision.look_again(left + 0.1)
        return
    turn.decision.delete += jobs
    turn.tell(Reason.CLEANED_UP, f"Children deleted {after} s after the end; the record stays.")


def _between(turn: Turn) -> None:
    """No attempt is open: wait for what must be waited for, then record the next one."""
    turn.decision.delete += _obsolete(turn)
    holding = any(not pod.ended and pod.uid not in turn.seen.lost for pod in turn.seen.pods)
    if turn.seen.suspend:
        _stay_suspended(turn, holding=holding)
    elif turn.deadline_left(None) <= 0:
        turn.fail_by_deadline()
    elif (pause := max(_backoff_left(turn), preflight.pause(turn))) > 0:
        turn.decision.look_again(pause)
    elif holding:  # two runs at once would write into the same checkpoints
        turn.decision.look_again(POLL)
    elif not preflight.pinned(turn) and (wait := upstream.waits(turn.seen.spec, turn.seen.name, turn.seen.upstreams)):
        drop(turn.status, C.SUSPENDED)
        turn.wait_for(wait)
        turn.decision.look_again(POLL)
    else:
        _go_on(turn)


def _go_on(turn: Turn) -> None:
    """The next preflight or attempt: of what status.resolved pins, or of the spec as it is now."""
    seen, status = turn.seen, turn.status
    last, pinned = attempts.latest(status), preflight.pinned(turn)
    attempt = Attempt(
        number=last.number + 1 if last else 1,
        generation=seen.generation,
        spec_digest=pinned or "",
        template_digest=turn.template,
        job_name=child_name(seen.name, seen.uid, last.number + 1 if last else 1),
        recorded_time=stamp(turn.now),
    )
    try:
        plan = (
            specs.plan_pinned(seen, attempt, status) if pinned else specs.plan_new(seen, attempt.number, turn.defaults)
        )
    except specs.InvalidSpec as error:
        attempts.add(status, attempt)
        turn.fail_attempt(attempt, Failure(cause="UserError", message=str(error), next_step=EDIT))
        return
    if preflight.is_due(turn, plan.resolved) and not seen.unshared:
        if not seen.unbound:
            preflight.begin(turn, plan.resolved)
            return
        preflight.leave_out(turn)
    _record_attempt(turn, attempt, plan)


def _stay_suspended(turn: Turn, *, holding: bool) -> None:
    if holding:
        turn.say(C.SUSPENDED, False, Reason.SUSPENDING, "Pods are saving and ending.")
        turn.decision.look_again(POLL)
        return
    drop(turn.status, C.WAITING, C.RECONCILING)
    turn.say(C.RUNNING, False, Reason.SUSPENDED, "Suspended.")
    if not holds(turn.status, C.SUSPENDED):
        turn.say(C.SUSPENDED, True, Reason.SUSPENDED, "spec.suspend is true, and no pod runs.")
        turn.tell(Reason.SUSPENDED, "No pod runs until spec.suspend is false.", turn=turn.seen.generation)


def _record_attempt(turn: Turn, attempt: Attempt, plan: Plan) -> None:
    """Write-ahead: number, generation and digests are in status before the first child exists."""
    seen, status, last = turn.seen, turn.status, attempts.latest(turn.status)
    attempts.add(status, attempt)
    attempt.spec_digest = plan.resolved.digest
    if last and last.spec_digest != attempt.spec_digest:
        status.output = None
    status.resolved = plan.resolved.spec.to_wire()
    status.gpus = plan.resolved.spec.resources.gpus
    status.start_time = status.start_time or stamp(turn.now)
    if seen.unshared:
        during.refuse_unshared(turn, attempt)
        return
    drop(status, C.SUSPENDED, C.WAITING)
    turn.say(C.RECONCILING, True, Reason.CREATED, f"Making Job {attempt.job_name}.")
    turn.say(C.RUNNING, False, Reason.CREATED, "Its pods have not started yet.")
    if not holds(status, C.SPEC_FROZEN):
        turn.say(C.SPEC_FROZEN, False, Reason.NOT_STARTED, "Everything can be edited until training begins.")
    turn.tell(Reason.CREATED, f"Attempt {attempt.number} is Job {attempt.job_name}.")
    turn.decision.create = plan
    turn.decision.look_again(SETTLE)


def _backoff_left(turn: Turn) -> float:
    """Seconds until a counted failure may be tried again."""
    failures, last = turn.status.counted_failures, attempts.latest(turn.status)
    if not failures or last is None or last.outcome != "Failed" or last.end_time is None:
        return 0.0
    pause = timedelta(seconds=min(BACKOFF * 2 ** (failures - 1), BACKOFF_MAX))
    return (read(last.end_time) + pause - turn.now).total_seconds()


def _obsolete(turn: Turn) -> list[JobView]:
    """Jobs of earlier attempts and preflights: what may still run goes at once; of those that have ended the latest stays to be looked at."""
    jobs = [job for job in turn.seen.jobs.values() if not job.deleting]
    newest = max((job.attempt for job in jobs if job.ended), default=0)
    check = turn.status.preflight
    kept = check.job_name if check else ""
    return [job for job in jobs if not job.ended or (job.name != kept if job.is_preflight else job.attempt < newest)]
