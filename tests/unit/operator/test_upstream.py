"""Jobs that continue what another one publishes: what they wait for, what they cannot continue, what they are pinned to."""

from typing import Any

import pytest

from finetune_crds.v1alpha1 import Condition, FineTuneJobStatus, OutputStatus
from finetune_operator.turn import POLL
from finetune_operator.upstream import Upstream

from .builders import World

MODEL = "hf://example/model"
OTHER = {
    "output": {"uri": "s3://bucket/first", "endpoint": "http://minio:9000", "region": "eu", "secretRef": {"name": "w"}}
}


def _upstream(
    condition: str | None = "Complete", *, format: Any = "peft", method: str = "lora", digest: str | None = "sha256:1",
    uri: str = "s3://bucket/first",
) -> Upstream:  # fmt: skip
    conditions = [
        Condition(type=condition, status="True", reason="R", message="", last_transition_time="2026-01-31T12:00:00Z")
    ] if condition else []  # fmt: skip
    return Upstream(
        OTHER,
        FineTuneJobStatus(
            phase="Running",
            conditions=conditions,
            output=OutputStatus(uri=uri, digest=digest, format=format) if condition == "Complete" else None,
            resolved={"method": {method: {}}},
        ),
    )


def _chain(upstream: Upstream | None = None, *, model: dict[str, Any] | None = None, **spec: Any) -> World:
    world = World(model=model or {"uri": MODEL, "adapter": {"job": "first", "secretRef": {"name": "r"}}}, **spec)
    world.upstreams = {"first": upstream} if upstream else {}
    return world


@pytest.mark.parametrize(
    ("upstream", "sentence"),
    [
        (None, "there is no FineTuneJob first in this namespace"),
        (_upstream(None), "FineTuneJob first is not Complete (Running)"),
        (_upstream("Failed"), "FineTuneJob first has failed: edit it, or set finetune.dev/retry on it"),
    ],
    ids=["absent", "running", "failed"],
)
def test_it_waits_until_the_other_job_is_complete(upstream: Upstream | None, sentence: str) -> None:
    world = _chain(upstream)
    decision = world.decide()
    assert decision.create is None
    assert decision.requeue == POLL
    assert (world.status.phase, world.holds("Waiting")) == ("Waiting", "WaitingForJob")
    (message,) = [each.message for each in world.status.conditions or () if each.type == "Waiting"]
    assert message.startswith(f"model.adapter.job: {sentence}")
    assert world.told == ["WaitingForJob"]
    assert world.decide().events == [], "told once"
    assert not world.status.attempts
    world.upstreams = {"first": _upstream()}
    assert world.decide().create is not None
    assert world.holds("Waiting") is None


def test_what_the_other_job_published_is_pinned() -> None:
    world = _chain(_upstream())
    plan = world.decide().create
    assert plan is not None and plan.resolved.spec.model is not None
    adapter = plan.resolved.spec.model.adapter
    assert adapter is not None and adapter.secret_ref is not None
    assert (adapter.uri, adapter.digest, adapter.job) == ("s3://bucket/first", "sha256:1", "first")
    assert (adapter.endpoint, adapter.region, adapter.secret_ref.name) == ("http://minio:9000", "eu", "r")
    digest = plan.resolved.digest
    other = _chain(_upstream(digest="sha256:2")).decide().create
    assert other is not None and other.resolved.digest != digest, "another adapter is another job"
    # The other job is gone and started over: this one retries with what it had.
    world.job_made().pod_runs().decided()
    world.upstreams = {}
    world.failed(70).after(60)
    again = world.decide().create
    assert again is not None and again.attempt == 2
    assert again.resolved.spec == plan.resolved.spec


def test_an_image_is_asked_for_by_its_digest() -> None:
    plan = _chain(_upstream(uri="oci://registry/first:v1")).decide().create
    assert plan is not None and plan.resolved.spec.model and plan.resolved.spec.model.adapter
    assert plan.resolved.spec.model.adapter.uri == "oci://registry/first:v1@sha256:1"


def test_a_whole_model_is_continued_too() -> None:
    plan = _chain(_upstream(format="transformers", method="full"), model={"job": "first"}).decide().create
    assert plan is not None and plan.resolved.spec.model is not None
    assert (plan.resolved.spec.model.uri, plan.resolved.spec.model.digest) == ("s3://bucket/first", "sha256:1")


@pytest.mark.parametrize(
    ("upstream", "model", "sentence"),
    [
        (_upstream(digest=None), None, "spec.model.adapter.job: FineTuneJob first tells no digest of its output"),
        (_upstream(format="transformers"), None, "published a whole model and no adapter; continue it by model.job"),
        (
            _upstream(format="bottleneck", method="adapter"),
            None,
            "an adapter of method adapter; only those of lora and",
        ),
        (_upstream(method="ia3"), None, "an adapter of method ia3; only those of lora and qlora can be continued"),
        (_upstream(), {"job": "first"}, "spec.model.job: FineTuneJob first published an adapter and no whole model"),
        (_upstream(), {"uri": MODEL, "adapter": {"job": "support-bot"}}, "support-bot is this very job"),
    ],
    ids=["no digest", "whole", "bottleneck", "ia3", "adapter", "itself"],
)
def test_what_cannot_be_continued_fails_and_is_mended_by_an_edit(
    upstream: Upstream, model: dict[str, Any] | None, sentence: str
) -> None:
    world = _chain(upstream, model=model)
    assert world.decide().create is None
    assert world.holds("Failed") == "UserError"
    assert world.status.failure is not None
    assert sentence in world.status.failure.message
    world.upstreams = {"first": _upstream()}
    assert world.decide().create is None, "it must not start over by itself"
    assert world.edited(model={"uri": MODEL, "adapter": {"job": "first"}}).decide().create is not None


def test_a_suspended_job_does_not_wait() -> None:
    world = _chain(None, suspend=True)
    world.decide()
    assert world.status.phase == "Suspended"
    world.edited(suspend=False).decide()
    assert (world.status.phase, world.holds("Suspended")) == ("Waiting", None)
