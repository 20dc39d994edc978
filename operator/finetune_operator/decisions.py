"""What a pass wants: decide.py makes it, act.py carries it out, in the order of the fields."""

from dataclasses import dataclass, field
from typing import NamedTuple

from finetune_crds.resolved import ResolvedJob
from finetune_crds.v1alpha1 import FineTuneJobStatus

from .views import JobView


class Event(NamedTuple):
    """A line of the story that `kubectl describe` tells."""

    reason: str
    note: str
    turn: str
    """Together with the reason it makes an event unique: the same turn of the same job is told once, whoever tells it."""
    warning: bool = False


class Plan(NamedTuple):
    """The children of an attempt, or of the preflight before it, that must exist."""

    resolved: ResolvedJob
    attempt: int
    grace_seconds: int
    preflight: int = 0
    """Number of the preflight whose children they are; 0 for those of an attempt."""


@dataclass
class Decision:
    """Wanted: this status; then these writes."""

    status: FineTuneJobStatus
    suspend: tuple[JobView, bool] | None = None
    delete: list[JobView] = field(default_factory=list)
    create: Plan | None = None
    events: list[Event] = field(default_factory=list)
    requeue: float | None = None
    """Seconds after which to look again though nothing happened."""
    settled: bool = False
    """Nothing is to be done until the object changes."""

    def look_again(self, seconds: float) -> None:
        """The soonest wins."""
        self.requeue = seconds if self.requeue is None else min(self.requeue, seconds)
