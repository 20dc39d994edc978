"""metav1.Conditions of a status: set, removed, asked for. decide.py calls it; phase is derived from them here and read by people only."""

from datetime import datetime
from typing import Literal

from finetune_crds.names import ConditionType, Reason
from finetune_crds.v1alpha1 import Condition, FineTuneJobStatus

from .clock import stamp

MESSAGE_MAX = 2048

Phase = Literal["Pending", "Waiting", "Preflight", "Starting", "Running", "Suspended", "Complete", "Failed"]


def find(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    """The condition of that type."""
    return next((each for each in status.conditions or () if each.type == kind), None)


def holds(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    """Whether the condition is there and True."""
    found = find(status, kind)
    return found is not None and found.status == "True"


def has_ended(status: FineTuneJobStatus) -> bool:
    """Whether the job is Complete or Failed."""
    return holds(status, ConditionType.COMPLETE) or holds(status, ConditionType.FAILED)


def reason_of(status: FineTuneJobStatus, kind: ConditionType) -> str:
    """Reason of the condition; empty when it is not there."""
    found = find(status, kind)
    return found.reason if found else ""


def put(
    status: FineTuneJobStatus,
    kind: ConditionType,
    value: bool,
    reason: str,
    message: str,
    *,
    generation: int,
    now: datetime,
) -> None:
    """Sets a condition; its transition time moves only when its status changes."""
    wanted: Literal["True", "False"] = "True" if value else "False"
    known = find(status, kind)
    condition = Condition(
        type=kind,
        status=wanted,
        reason=reason,
        message=message[:MESSAGE_MAX],
        last_transition_time=known.last_transition_time if known and known.status == wanted else stamp(now),
        observed_generation=generation,
    )
    if known != condition:
        status.conditions = [each for each in status.conditions or () if each.type != kind] + [condition]


def observe_generation(status: FineTuneJobStatus, generation: int) -> None:
    """A pass has looked at every condition in the light of this spec; `kubectl wait` takes no condition of an older one."""
    status.observed_generation = generation
    status.conditions = [
        each if each.observed_generation == generation else each.model_copy(update={"observed_generation": generation})
        for each in status.conditions or ()
    ] or None


def drop(status: FineTuneJobStatus, *kinds: ConditionType) -> None:
    """Removes conditions that are there only while they hold."""
    status.conditions = [each for each in status.conditions or () if each.type not in kinds]


def phase(status: FineTuneJobStatus) -> Phase:
    """One word for the printer column."""
    if holds(status, ConditionType.COMPLETE):
        return "Complete"
    if holds(status, ConditionType.FAILED):
        return "Failed"
    if holds(status, ConditionType.SUSPENDED):
        return "Suspended"
    if holds(status, ConditionType.RUNNING):
        return "Running"
    if holds(status, ConditionType.WAITING):
        return "Waiting"
    if reason_of(status, ConditionType.PREFLIGHT_PASSED) in (Reason.PREFLIGHT_RUNNING, Reason.PREFLIGHT_LOST):
        return "Preflight"
    return "Starting" if status.attempts and status.attempts[-1].end_time is None else "Pending"
