"""FineTuneJobs for tests, what simulated pods make of them, and ways to wait for what follows."""

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.cluster import Cluster

Json = dict[str, Any]
T = TypeVar("T")

POLL = 0.1
"""Seconds between two looks."""

FINISHED: Json = {
    "code": 0,
    "firstStep": 0,
    "step": 120,
    "totalSteps": 120,
    "metrics": [{"name": "loss", "value": "0.42"}],
    "output": {
        "uri": "pvc://models/out",
        "digest": "sha256:0123",
        "format": "peft",
        "servableBy": ["vllm"],
        "step": 120,
    },
}
"""The record of a run that has reached its end."""


class FineTuneJob:
    """A manifest in the making: `FineTuneJob("a", namespace).exits(64).retries(0)`."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name, self.namespace = name, namespace
        self.annotations: dict[str, str] = {}
        self.body: Json = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "model": {"uri": "hf://example/model"},
                "dataset": {"train": [{"uri": "s3://bucket/train.jsonl"}]},
                "output": {"uri": "s3://bucket/out"},
                "preflight": "Skip",
                "runtime": {"annotations": self.annotations},
            },
        }

    @property
    def spec(self) -> Json:
        spec: Json = self.body["spec"]
        return spec

    def kwok(self, **says: str) -> "FineTuneJob":
        """How its pods behave: the table in tests/cluster/kwok.py, with _ for -."""
        self.annotations |= {f"kwok.finetune.dev/{key.replace('_', '-')}": value for key, value in says.items()}
        return self

    def finishes(self, after: str = "0s", record: Json = FINISHED) -> "FineTuneJob":
        """Its pods end well."""
        return self.kwok(exit_code="0", message=json.dumps(record), run_for=after)

    def exits(self, code: int, message: Json | None = None, after: str = "0s") -> "FineTuneJob":
        """Its pods end with a code."""
        return self.kwok(exit_code=str(code), message=json.dumps(message) if message else "", run_for=after)

    def holds(self, stop_code: int = 75) -> "FineTuneJob":
        """Its pods run until they are stopped, and end with a code then; or until `end`."""
        return self.kwok(hold="true", stop_exit_code=str(stop_code))

    def checked(self, code: int = 0, message: Json | None = None, after: str = "0s", **says: str) -> "FineTuneJob":
        """A preflight comes first, and ends like this; without a message it passes, or says nothing."""
        self.spec["preflight"] = "Required"
        told = {"preflight_message": json.dumps(message)} if message else {}
        return self.kwok(preflight_exit_code=str(code), preflight_run_for=after, **told, **says)

    def having(self, **fields: Any) -> "FineTuneJob":
        """More fields of the spec."""
        self.spec.update(fields)
        return self

    def apply(self, cluster: Cluster) -> "FineTuneJob":
        cluster.api.apply("finetunejobs", self.body)
        return self

    def edit(self, cluster: Cluster, **spec: Any) -> None:
        """Merges into the spec of the object, not of the manifest."""
        cluster.api.patch("finetunejobs", self.name, {"spec": spec}, self.namespace)

    def end(self, cluster: Cluster) -> None:
        """Has its pods that hold end as they would have ended without."""
        kept = {"kwok.finetune.dev/hold": None, "kwok.finetune.dev/preflight-hold": None}
        for pod in listed(cluster, "pods", self.namespace, f"finetune.dev/job={self.name}"):
            cluster.api.patch("pods", pod["metadata"]["name"], {"metadata": {"annotations": kept}}, self.namespace)

    def delete(self, cluster: Cluster, propagation: str = "Background") -> None:
        """Deletes it and does not wait."""
        cluster.api.delete("finetunejobs", self.name, self.namespace, propagation)

    def read(self, cluster: Cluster) -> Json:
        """The object as it is."""
        return cluster.api.get("finetunejobs", self.name, self.namespace)

    def status(self, cluster: Cluster) -> Json:
        return dict(self.read(cluster).get("status", {}))

    def wait(self, cluster: Cluster, kind: str, value: str = "True", seconds: float = 150) -> Json:
        """Waits for a condition; its status then."""
        return self.until(cluster, lambda status: condition(status, kind).get("status") == value, seconds)

    def until(self, cluster: Cluster, holds: Callable[[Json], object], seconds: float = 120) -> Json:
        """Waits until something holds of the status."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status(cluster)
            if holds(status):
                return status
            time.sleep(POLL)
        raise AssertionError(f"waited {seconds} s for {self.name}: {json.dumps(self.status(cluster), indent=1)}")


def condition(status: Json, kind: str) -> Json:
    """A condition; empty when it is not there."""
    return next((dict(each) for each in status.get("conditions", ()) if each["type"] == kind), {})


def listed(cluster: Cluster, kinds: str, namespace: str, labels: str = "", fields: str = "") -> list[Json]:
    """Objects of some kinds in a namespace."""
    return cluster.api.list(kinds, namespace, labels, fields)


def told(cluster: Cluster, namespace: str) -> list[str]:
    """Reasons of the FineTuneJobs' events in order. They follow the status that they tell of."""
    found = listed(cluster, "events.events.k8s.io", namespace)
    ours = [each for each in found if each["regarding"]["kind"] == "FineTuneJob"]
    return [each["reason"] for each in sorted(ours, key=lambda each: str(each["eventTime"]))]


def pool(name: str) -> Json:
    """Resources that only nodes of this label and taint have."""
    return {"nodeSelector": {"pool": name}, "tolerations": [{"key": name, "operator": "Exists"}]}


def eventually(holds: Callable[[], T], what: str, seconds: float = 90, every: float = POLL) -> T:
    """Polls until it holds, `every` so many seconds; what was true then."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited {seconds} s: {what}"
        time.sleep(every)
    return found
