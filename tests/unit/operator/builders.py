"""A FineTuneJob and its children in memory: what a pass sees, changed word by word, with a clock that only tests move.

world = World().decided().job_made().pod_runs()
world.decided().status.phase == "Running"
"""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_crds.names import ANNOTATION_RETRY
from finetune_crds.resolution import Defaults
from finetune_crds.v1alpha1 import FineTuneJobStatus
from finetune_operator.clock import stamp
from finetune_operator.decide import decide
from finetune_operator.decisions import Decision
from finetune_operator.seen import Refusal, Seen, Unshared
from finetune_operator.upstream import Upstream
from finetune_operator.views import JobView, PodView
from finetune_operator.waiting import Note

DEFAULTS = Defaults(trainer_image="trainer:1")
FINISHED = {"code": 0, "step": 10, "totalSteps": 10, "output": {"uri": "s3://bucket/out", "digest": "sha256:0"}}


class World:
    """One FineTuneJob with its children; each method changes it and returns it."""

    def __init__(self, **spec: Any) -> None:
        self.now = datetime(2026, 1, 31, 12, tzinfo=UTC)
        self.created = stamp(self.now)
        self.generation = 1
        self.annotations: dict[str, str] = {}
        self.spec: dict[str, Any] = {
            "model": {"uri": "hf://example/model"},
            "dataset": {"train": [{"uri": "s3://bucket/train.jsonl"}]},
            "output": {"uri": "s3://bucket/out"},
            "preflight": "Skip",
            **spec,
        }
        self.spec = {name: value for name, value in self.spec.items() if value is not None}
        self.status = FineTuneJobStatus()
        self.jobs: dict[str, JobView] = {}
        self.pods: list[PodView] = []
        self.lost: set[str] = set()
        self.notes: list[Note] = []
        self.unshared: Unshared | None = None
        self.unbound = ""
        self.refused: Refusal | None = None
        self.upstreams: dict[str, Upstream] = {}
        self.deleting = False
        self.last: Decision | None = None

    # Passes

    def seen(self) -> Seen:
        return Seen(
            namespace="team",
            name="support-bot",
            uid="uid-1",
            version="1",
            generation=self.generation,
            created=self.created,
            deleting=self.deleting,
            annotations=self.annotations,
            spec=self.spec,
            status=self.status,
            jobs=self.jobs,
            pods=self.pods,
            lost=frozenset(self.lost),
            notes=self.notes,
            unshared=self.unshared,
            unbound=self.unbound,
            refused=self.refused,
            upstreams=self.upstreams,
        )

    def body(self, name: str, version: int) -> dict[str, Any]:
        """The object as the API server would give it."""
        meta = {"namespace": "team", "name": name, "uid": name, "generation": 1, "creationTimestamp": self.created}
        return {
            "metadata": {**meta, "resourceVersion": str(version)},
            "spec": self.spec,
            "status": self.status.to_wire(),
        }

    def decide(self) -> Decision:
        """One pass; its status becomes the object's."""
        self.last = decide(self.seen(), self.now, DEFAULTS)
        self.status = self.last.status
        return self.last

    def decided(self) -> "World":
        self.decide()
        return self

    def after(self, seconds: float) -> "World":
        self.now += timedelta(seconds=seconds)
        return self

    def edited(self, **spec: Any) -> "World":
        self.spec = {**self.spec, **spec}
        self.generation += 1
        return self

    def retry(self, value: str) -> "World":
        self.annotations = {ANNOTATION_RETRY: value}
        return self

    # The Job

    @property
    def job(self) -> JobView:
        return list(self.jobs.values())[-1]

    def job_made(self) -> "World":
        """What the last decision wanted to create is there, and its pod is not."""
        assert self.last is not None and self.last.create is not None
        attempt, check = self.last.create.attempt, self.last.create.preflight
        doing = self.status.preflight if check else (self.status.attempts or [None])[-1]
        assert doing is not None
        name = doing.job_name
        self.jobs[name] = JobView(
            namespace="team",
            name=name,
            uid=f"check-{check}" if check else f"job-{attempt}",
            owner="uid-1",
            owner_name="support-bot",
            controller="uid-1",
            attempt=attempt,
            created=stamp(self.now),
            suspended=False,
            started=stamp(self.now),
            active=0,
            terminating=0,
            complete=None,
            failed=None,
            failure="",
            deleting=False,
            is_preflight=bool(check),
        )
        return self

    def job_says(self, **fields: Any) -> "World":
        self.jobs[self.job.name] = replace(self.job, **fields)
        return self

    def job_ends(self, kind: str, failure: str = "") -> "World":
        return self.job_says(**{kind: stamp(self.now)}, failure=failure, active=0)

    def job_gone(self) -> "World":
        del self.jobs[self.job.name]
        return self

    def carried_out(self) -> "World":
        """Suspensions and deletions of the last decision have happened."""
        assert self.last is not None
        if self.last.suspend:
            job, value = self.last.suspend
            self.jobs[job.name] = replace(job, suspended=value, started=None if value else stamp(self.now))
        for job in self.last.delete:
            self.jobs.pop(job.name, None)
        return self

    # Pods

    def pod(self, index: int = 0, **fields: Any) -> "World":
        """A new pod of the latest Job."""
        number = sum(pod.index == index for pod in self.pods)
        self.pods.append(
            PodView(
                namespace="team",
                name=f"{self.job.name}-{index}-{number}",
                uid=f"pod-{index}-{number}",
                owner="uid-1",
                owner_name="support-bot",
                job_name=self.job.name,
                controller=self.job.uid,
                attempt=self.job.attempt,
                index=index,
                phase="Pending",
                node=None,
                created=stamp(self.now),
                scheduled=None,
                running_since=None,
                deleted=None,
                unschedulable=None,
                disrupted=None,
                evicted=None,
                waiting=None,
                waiting_message="",
                exit_code=None,
                exit_reason="",
                message="",
                finished=None,
                image="",
                is_preflight=self.job.is_preflight,
            )
        )
        return self.job_says(active=self.job.active + 1).pod_says(**fields)

    def pod_says(self, **fields: Any) -> "World":
        """Changes the latest pod."""
        self.pods[-1] = replace(self.pods[-1], **fields)
        return self

    def pod_runs(self, index: int = 0) -> "World":
        moment = stamp(self.now)
        return self.pod(index, phase="Running", node="node-0", scheduled=moment, running_since=moment)

    def pod_ends(self, code: int, message: dict[str, Any] | str = "", **fields: Any) -> "World":
        text = message if isinstance(message, str) else json.dumps(message)
        phase = "Succeeded" if code == 0 else "Failed"
        return self.pod_says(phase=phase, exit_code=code, message=text, finished=stamp(self.now), **fields)

    # Shorthand

    def running(self, nodes: int = 1) -> "World":
        """From nothing to training."""
        self.decided().job_made()
        for index in range(nodes):
            self.pod_runs(index)
        return self.decided()

    def failed(self, code: int, message: dict[str, Any] | str = "", **fields: Any) -> "World":
        """The running pod ends with a code that no rule of the Job ignores, and so does the Job."""
        return (
            self.pod_ends(code, message, **fields).job_ends("failed", "BackoffLimitExceeded: no more tries").decided()
        )

    def holds(self, kind: str) -> str | None:
        """Reason of a condition that is True."""
        found = [each for each in self.status.conditions or () if each.type == kind and each.status == "True"]
        return found[0].reason if found else None

    @property
    def told(self) -> list[str]:
        """Reasons of the last decision's events."""
        assert self.last is not None
        return [event.reason for event in self.last.events]
