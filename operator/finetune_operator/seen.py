"""What one pass saw of one FineTuneJob. observe.py fills it in, decide.py reads nothing else."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from finetune_crds.names import ANNOTATION_RETRY
from finetune_crds.v1alpha1 import FineTuneJobStatus

from .identities import template_digest
from .upstream import Upstream
from .views import JobView, PodView
from .waiting import Note

Json = dict[str, Any]


class Refusal(NamedTuple):
    """The API server's answer when a child could not be created."""

    message: str
    lasting: bool
    """422: no later try will be answered otherwise. 403: quota or admission, which may change."""


class Unshared(NamedTuple):
    """A claim that several nodes would have to mount and cannot."""

    claim: str
    modes: list[str]


@dataclass(frozen=True)
class Seen:
    """A FineTuneJob, its children, and what was asked about them."""

    namespace: str
    name: str
    uid: str
    version: str
    """resourceVersion: what a status write is fenced by."""
    generation: int
    created: str
    deleting: bool
    annotations: dict[str, str]
    spec: Json
    """As the user wrote it."""
    status: FineTuneJobStatus
    jobs: dict[str, JobView] = field(default_factory=dict)
    pods: list[PodView] = field(default_factory=list)
    lost: frozenset[str] = frozenset()
    """UIDs of pods that are terminating on nodes that are not there."""
    notes: list[Note] = field(default_factory=list)
    """Events about pods that do not start, the latest first; asked for only then."""
    unshared: Unshared | None = None
    unbound: str = ""
    """A claim whose volume is made where its first pod lands; looked up between attempts, until training has begun."""
    refused: Refusal | None = None
    upstreams: dict[str, Upstream] = field(default_factory=dict)
    """Jobs whose output this one reads, by name; looked up while no attempt is open."""

    @property
    def suspend(self) -> bool:
        """Whether the user wants it stopped."""
        return bool(self.spec.get("suspend"))

    @property
    def retry(self) -> str:
        """The user's retry annotation."""
        return self.annotations.get(ANNOTATION_RETRY, "")[:256]

    @property
    def retries(self) -> int:
        """Counted failures that are tried again; may be edited at any time."""
        given: int | None = self.spec.get("retries")
        pinned: int = (self.status.resolved or {}).get("retries", 0)
        return pinned if given is None else given

    @property
    def active_deadline(self) -> int | None:
        """Seconds."""
        return self.spec.get("activeDeadlineSeconds")

    @property
    def is_program(self) -> bool:
        """A program of the user's own."""
        return bool(self.spec.get("runtime", {}).get("command"))

    @cached_property
    def template(self) -> str:
        """Digest of what shapes the pods."""
        return template_digest(self.spec)

    @property
    def nodes(self) -> int:
        """Pods that train together, in the attempt on record."""
        resources = (self.status.resolved or {}).get("resources", {})
        return int(resources.get("nodes", 1))
