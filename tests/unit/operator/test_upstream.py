"""Jobs that read what another one publishes: what they wait for, what they cannot read, what they are pinned to; and who wakes them."""

import asyncio
from typing import Any

import pytest

from finetune_crds.resolved import ResolvedFineTune, ResolvedRewardModel
from finetune_crds.v1alpha1 import Condition, FineTuneJobStatus, OutputStatus
from finetune_operator.decisions import Plan
from finetune_operator.events import EventRecorder
from finetune_operator.queue import Queue
from finetune_operator.reconcile import reconcile
from finetune_operator.settings import Settings
from finetune_operator.state import Key, State
from finetune_operator.turn import POLL
from finetune_operator.upstream import Upstream

from .builders import FINISHED, World

MODEL = "hf://example/model"
OTHER = {
    "output": {"uri": "s3://bucket/first", "endpoint": "http://minio:9000", "region": "eu", "secretRef": {"name": "w"}}
}


def _upstream(
    condition: str | None = "Complete", *, format: Any = "peft", method: str = "lora", digest: str | None = "sha256:1",
    uri: str = "s3://bucket/first", **resolved: Any,
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
            resolved={"method": {method: {}}, **resolved},
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


BASE = {"uri": "s3://bucket/base", "digest": "sha256:b", "job": "sft", "endpoint": "http://minio:9000"}
REWARD = {
    "task": "text-generation",
    "objective": {"reward": {"centering": "0"}},
    "model": BASE | {"secretRef": {"name": "theirs"}},
}


def _judged(upstream: Upstream | None, model: dict[str, Any], **spec: Any) -> World:
    rewards = [{"name": "form", "regex": {"pattern": "x"}}, {"name": "liked", "model": model}]
    return _chain(upstream, model={"uri": MODEL}, objective={"grpo": {"rewards": rewards}}, **spec)


def _judge(plan: Plan | None) -> ResolvedRewardModel:
    assert plan is not None and isinstance(plan.resolved.spec, ResolvedFineTune)
    objective = plan.resolved.spec.objective
    assert objective is not None and objective.grpo is not None
    judge = objective.grpo.rewards[1].model
    assert judge is not None
    return judge


def test_a_reward_model_is_waited_for_and_pinned() -> None:
    world = _judged(None, {"job": "first"})
    assert world.decide().create is None
    (message,) = [each.message for each in world.status.conditions or () if each.type == "Waiting"]
    assert message.startswith("objective.grpo.rewards[1].model.job: there is no FineTuneJob first")
    world.upstreams = {"first": _upstream(format="transformers", method="full", **REWARD)}
    judge = _judge(world.decide().create)
    assert (judge.uri, judge.digest, judge.job, judge.adapter) == ("s3://bucket/first", "sha256:1", "first", None)


def test_an_adapter_judges_on_the_base_that_it_was_trained_on() -> None:
    """What is read on the same server is read with the same Secret; that of the other job is its own."""
    world = _judged(_upstream(**REWARD), {"job": "first", "secretRef": {"name": "r"}})
    plan = world.decide().create
    judge = _judge(plan)
    assert judge.secret_ref is not None and judge.adapter is not None and judge.adapter.secret_ref is not None
    assert (judge.uri, judge.digest, judge.job, judge.secret_ref.name) == ("s3://bucket/base", "sha256:b", "sft", "r")
    assert (judge.adapter.uri, judge.adapter.digest, judge.adapter.job) == ("s3://bucket/first", "sha256:1", "first")
    assert (judge.adapter.endpoint, judge.adapter.region, judge.adapter.secret_ref.name) == ("http://minio:9000", "eu", "r")  # fmt: skip
    elsewhere = _upstream(**REWARD | {"model": {"uri": "hf://example/base"}})
    judge = _judge(_judged(elsewhere, {"job": "first", "secretRef": {"name": "r"}}).decide().create)
    assert (judge.uri, judge.secret_ref) == ("hf://example/base", None)
    other = _judged(_upstream(digest="sha256:2", **REWARD), {"job": "first", "secretRef": {"name": "r"}}).decide()
    assert plan and other.create and other.create.resolved.digest != plan.resolved.digest


def test_the_base_may_be_named_beside_it() -> None:
    judge = _judge(_judged(_upstream(**REWARD), {"uri": "pvc://m/base", "adapter": {"job": "first"}}).decide().create)
    assert judge.adapter is not None
    assert (judge.uri, judge.digest, judge.adapter.digest) == ("pvc://m/base", None, "sha256:1")


@pytest.mark.parametrize(
    ("upstream", "model", "sentence"),
    [
        (_upstream(**REWARD | {"objective": {"sft": {}}}), {"job": "first"}, "published no reward model; name a job with objective reward"),
        (_upstream(format="bottleneck", method="adapter", **REWARD), {"job": "first"}, "an adapter of method adapter, which judges nothing"),
        (_upstream(**REWARD), {"job": "first", "adapter": {"uri": "pvc://m/a"}}, "an adapter and no whole model for one to be put on"),
        (_upstream(format="transformers", **REWARD), {"uri": MODEL, "adapter": {"job": "first"}}, "a whole model and no adapter; name it by model.job"),
        (_upstream(), {"job": "first"}, "does not tell of which model; name that by model.uri"),
        (_upstream(digest=None), {"job": "first"}, "tells no digest of its output"),
        (_upstream(**REWARD), {"job": "support-bot"}, "support-bot is this very job"),
    ],
    ids=["sft", "bottleneck", "adapter as base", "whole as adapter", "without base", "no digest", "itself"],
)  # fmt: skip
def test_what_judges_nothing_is_refused(upstream: Upstream, model: dict[str, Any], sentence: str) -> None:
    world = _judged(upstream, model)
    assert world.decide().create is None
    assert world.holds("Failed") == "UserError"
    assert world.status.failure is not None
    assert "spec.objective.grpo.rewards[1].model." in world.status.failure.message
    assert sentence in world.status.failure.message


async def test_the_end_of_a_job_wakes_those_that_wait_for_it() -> None:
    """Nothing is written in the passes here, so that no API server is asked."""
    first = World().running()
    second = _chain(Upstream(first.spec, first.status)).decided()
    seen: set[Key] = set()
    passes: asyncio.Queue[str] = asyncio.Queue()

    async def work(key: Key) -> float | None:
        again = None if key in seen else await reconcile(state, key)
        seen.add(key)
        passes.put_nowait(key[1])
        return again

    queue = Queue(work)
    no_server: Any = None
    state = State(
        Settings(trainer_image="trainer:1", namespace="operators"), no_server, EventRecorder(no_server, "it"),
        lambda: "", lambda before, after: None, wake=queue.add,
    )  # fmt: skip
    state.cache.put(first.body("first", 1))
    state.cache.put(second.body("second", 2))
    running = asyncio.create_task(queue.run(2))
    async with asyncio.timeout(10):
        queue.add(("team", "second"), after=0)
        assert await passes.get() == "second"
        first.pod_ends(0, FINISHED).job_ends("complete").decided()
        first.jobs.clear()
        state.cache.put(first.decided().body("first", 3))
        queue.add(("team", "first"), after=0)
        assert [await passes.get(), await passes.get()] == ["first", "second"]
    running.cancel()
    assert passes.empty()
