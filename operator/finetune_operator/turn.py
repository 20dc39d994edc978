"""One pass in the making: what was seen, the clock, and the status being changed. The steps of decide.py share its small verbs."""

from collections.abc import Iterable
from datetime import datetime

from finetune_crds.names import ConditionType as C
from finetune_crds.names import Reason
from finetune_crds.resolution import Defaults
from finetune_crds.v1alpha1 import Attempt, Failure, FineTuneJobStatus
from finetune_crds.verdict import OUTCOMES, ExitCode

from . import attempts, waiting
from .clock import seconds_between, stamp
from .conditions import drop, put, reason_of
from .decisions import Decision, Event
from .seen import Seen
from .views import JobView, PodView
from .waiting import Wait

POLL = 15.0
"""Seconds after which something that sends no event is looked at again."""
SETTLE = 5.0
"""Seconds that pods get to start before the status says why they do not."""
START = 20.0
"""Seconds after which a job is no longer Reconciling though nothing tells why its pods do not run."""

DEADLINE = "DeadlineExceeded"
STOPPING = (DEADLINE, Reason.SUSPENDING, Reason.SUSPENDED)
"""Reasons of the condition Suspended while no time counts."""
EDIT = OUTCOMES[ExitCode.USER_ERROR].next_step


class Turn:
    """One pass."""

    def __init__(self, seen: Seen, now: datetime, defaults: Defaults) -> None:
        self.seen, self.now, self.defaults = seen, now, defaults
        self.status = _copied(seen.status)
        self.decision = Decision(self.status)
        self.template = seen.template

    def say(self, kind: C, value: bool, reason: str, message: str) -> None:
        """Sets a condition."""
        put(self.status, kind, value, reason, message, generation=self.seen.generation, now=self.now)

    def tell(self, reason: str, note: str, *, turn: object = "", warning: bool = False) -> None:
        """An event, once for each attempt, reason and turn."""
        attempt = attempts.latest(self.status)
        number = attempt.number if attempt else 0
        self.decision.events.append(Event(reason, note, f"{number}/{turn}", warning))

    def explain_start(self, job: JobView, starting: Iterable[PodView]) -> None:
        """Says why pods do not run yet, once they have had the time to, and when to look again."""
        age = seconds_between(job.started or job.created, self.now)
        if age < SETTLE:
            self.decision.look_again(SETTLE - age + 0.1)
            return
        if wait := waiting.explain(starting, self.seen.notes):
            self.wait_for(wait)
        elif age >= START:
            drop(self.status, C.WAITING, C.RECONCILING)
        self.decision.look_again(SETTLE if age < START else POLL)

    def wait_for(self, wait: Wait) -> None:
        """Something outside the job is missing."""
        drop(self.status, C.RECONCILING)
        if reason_of(self.status, C.WAITING) != wait.reason:
            self.tell(wait.reason, wait.message, turn=wait.message, warning=True)
        self.say(C.WAITING, True, wait.reason, wait.message)

    def end_conditions(self) -> None:
        """What can no longer hold after the end."""
        drop(self.status, C.WAITING, C.RECONCILING, C.SUSPENDED)
        self.say(C.RUNNING, False, "Ended", "It has ended.")

    def fail_attempt(
        self, attempt: Attempt, failure: Failure, *, reason: str = "", end: datetime | None = None
    ) -> None:
        """The attempt has failed for good, and the job with it."""
        attempts.close(self.status, attempt, "Failed", failure.cause, end=end or self.now)
        self.fail(failure, reason=reason)

    def fail(self, failure: Failure, *, reason: str = "") -> None:
        """The job has failed: kstatus says so, and its spec can be edited."""
        reason = reason or failure.cause
        self.end_conditions()
        for kind in (C.FAILED, C.STALLED):
            self.say(kind, True, reason, failure.message)
        self.say(C.SPEC_FROZEN, False, Reason.FAILED, "Everything can be edited after a failure.")
        self.status.failure = failure
        self.status.completion_time = stamp(self.now)
        self.status.retry_handled = self.seen.retry or None
        told = f"{self.seen.generation}/{self.seen.retry}"  # what fails again after an edit or a retry is told again
        self.tell(Reason.FAILED, f"{reason}: {failure.message}", turn=told, warning=True)

    def fail_by_deadline(self) -> None:
        """The user's own limit has ended it."""
        self.fail(
            Failure(
                cause="DeadlineExceeded",
                message=f"It has not ended within the {self.seen.active_deadline} s of activeDeadlineSeconds.",
                next_step="Raise activeDeadlineSeconds and set the annotation finetune.dev/retry: "
                "it continues from its last checkpoint.",
            )
        )

    def spend(self, job: JobView) -> None:
        """Books the Job's active time: its attempt ends, or is suspended."""
        if reason_of(self.status, C.SUSPENDED) not in STOPPING:  # else it is booked
            self.status.active_seconds = (self.status.active_seconds or 0) + round(active_seconds(job, self.now))

    def deadline_left(self, job: JobView | None) -> float:
        """Seconds of spec.activeDeadlineSeconds that are left; time while suspended does not count."""
        if self.seen.active_deadline is None:
            return float("inf")
        stopping = reason_of(self.status, C.SUSPENDED)
        if stopping == DEADLINE:
            return 0.0
        used = float(self.status.active_seconds or 0)
        if job and stopping not in STOPPING:
            used += active_seconds(job, self.now)
        return self.seen.active_deadline - used


def _copied(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """A copy whose parts that a pass changes in place are its own; a deep copy costs more than the rest of a pass."""
    return status.model_copy(
        update={
            "attempts": [attempt.model_copy() for attempt in status.attempts] if status.attempts else None,
            "checkpoints": status.checkpoints.model_copy() if status.checkpoints else None,
            "usage": status.usage.model_copy() if status.usage else None,
        }
    )


def active_seconds(job: JobView, now: datetime) -> float:
    """Seconds since the Job was made or resumed; 0 while it is suspended."""
    if job.suspended or not job.started:
        return 0.0
    return seconds_between(job.started, job.complete or job.failed or now)
