"""Every branch of the decision, on a world in memory."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from finetune_crds.v1alpha1 import Checkpoint, CheckpointsStatus, Progress
from finetune_operator.decide import decide
from finetune_operator.events import EventRecorder
from finetune_operator.observe import observe
from finetune_operator.seen import Refusal, Unshared
from finetune_operator.settings import Settings
from finetune_operator.state import State
from finetune_operator.turn import POLL, SETTLE, START, active_seconds
from finetune_operator.views import job_view, pod_view
from finetune_operator.waiting import Note

from .builders import DEFAULTS, FINISHED, World


def _attempts(world: World) -> list[tuple[str | None, str | None]]:
    return [(attempt.outcome, attempt.cause) for attempt in world.status.attempts or ()]


# Before and at the start


def test_an_attempt_is_recorded_before_its_children_are_made() -> None:
    world = World()
    decision = world.decide()
    assert decision.create is not None
    (attempt,) = world.status.attempts or ()
    assert (attempt.number, attempt.generation, attempt.spec_digest) == (1, 1, decision.create.resolved.digest)
    assert attempt.template_digest
    assert world.status.resolved == decision.create.resolved.spec.to_wire()
    assert (world.status.phase, world.status.gpus) == ("Starting", 1)
    assert world.holds("Reconciling") == "Created"


def test_children_are_built_from_what_was_recorded_also_after_a_crash_and_an_upgrade() -> None:
    world = World()
    first = world.decide().create
    assert first is not None
    again = world.after(60).decide().create
    assert again is not None
    assert again.resolved == first.resolved
    assert len(world.status.attempts or ()) == 1


def _kstatus(world: World) -> str:
    """What Flux makes of it: sigs.k8s.io/cli-utils, pkg/kstatus/status/generic.go."""
    if world.status.observed_generation != world.generation:
        return "InProgress"
    verdicts = {"Reconciling": "InProgress", "Stalled": "Failed"}
    return next((verdicts[kind] for kind in verdicts if world.holds(kind)), "Current")


@pytest.mark.parametrize(
    ("world", "phase", "result"),
    [
        (World().decided(), "Starting", "InProgress"),
        (World(preflight="Required").decided(), "Preflight", "InProgress"),
        (World(preflight="Required").decided().job_made().pod_runs().decided(), "Preflight", "Current"),
        (World().running(), "Running", "Current"),
        (World().running().edited(activeDeadlineSeconds=9), "Running", "InProgress"),
        (World().running().edited(activeDeadlineSeconds=9).decided(), "Running", "Current"),
        (World().running().pod_says(deleted="x").pod().decided(), "Starting", "Current"),
        (World(suspend=True).decided(), "Suspended", "Current"),
        (World().running().pod_ends(0, FINISHED).job_ends("complete").decided(), "Complete", "Current"),
        (World().running().failed(64), "Failed", "Failed"),
        (World().running().failed(70), "Pending", "Current"),
        (World().running().failed(70).after(60).decided(), "Starting", "InProgress"),
        (World().running().failed(64).retry("again").decided(), "Starting", "InProgress"),
    ],
)
def test_gitops_reads_each_phase_as_kstatus_does(world: World, phase: str, result: str) -> None:
    assert (world.status.phase, _kstatus(world)) == (phase, result)


def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    world = World().running()
    world.deleting = True
    decision = world.decide()
    assert (decision.create, decision.delete, decision.events, decision.requeue) == (None, [], [], None)


def test_a_second_pass_changes_nothing() -> None:
    for world in (World().decided(), World().running(), World().running().failed(66)):
        before = world.status
        assert world.decide().status == before
        assert world.told == []


def test_several_nodes_on_one_claim_fail_before_any_child_is_made() -> None:
    world = World(resources={"nodes": 2})
    world.unshared = Unshared("disk", ["ReadWriteOnce"])
    decision = world.decide()
    assert decision.create is None
    assert world.holds("Failed") == "VolumeNotShared"
    assert world.status.failure is not None
    assert "disk" in world.status.failure.message
    assert "ReadWriteOnce" in world.status.failure.message
    world.unshared = None
    assert world.decide().create is None, "it must not start over by itself"
    assert world.edited(resources={"nodes": 1}).decide().create is not None


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"training": {"learningRate": "fast"}}, "spec.training.learningRate: "),
        ({"model": {"uri": "hf://gpt2"}}, "spec.model.uri: 'hf://gpt2' needs an organisation and a name"),
        ({"dataset": {"train": [{"uri": "hf://imdb"}]}, "resources": {"nodes": 2}}, "spec.dataset.train[0].uri: "),
        ({"output": {"uri": "hf://gpt2"}}, "spec.output.uri: "),
    ],
)
async def test_a_spec_that_an_older_schema_let_pass_is_the_users_error(spec: dict[str, Any], field: str) -> None:
    world, no_server = World(preflight=None, **spec), cast("Any", None)
    state = State(Settings(), no_server, EventRecorder(no_server, "it"), lambda: "", lambda before, after: None)
    state.cache.put(world.body("support-bot", 1))
    seen = await observe(state, ("team", "support-bot"), world.now)
    assert seen is not None
    failure = decide(seen, world.now, DEFAULTS).status.failure
    assert failure is not None
    assert failure.cause == "UserError"
    assert failure.message.startswith(field)


def test_what_an_earlier_version_pinned_and_nobody_can_mount_is_the_users_error() -> None:
    world = World().decided()
    assert world.status.resolved is not None
    world.status.resolved["model"]["uri"] = "hf://gpt2"
    assert world.decide().create is None
    assert world.status.failure is not None
    assert world.status.failure.cause == "UserError"
    assert "model.uri: 'hf://gpt2' needs an organisation" in world.status.failure.message


# Running and waiting


def test_running_freezes_the_spec_and_ends_reconciling() -> None:
    world = World().running()
    assert world.status.phase == "Running"
    assert world.holds("SpecFrozen") == "Training"
    assert world.holds("Reconciling") is None
    (attempt,) = world.status.attempts or ()
    assert (attempt.runs, attempt.run_id) == (1, "pod-0-0")


def test_with_several_nodes_it_runs_when_all_do() -> None:
    world = World(resources={"nodes": 2}).decided().job_made().pod_runs(0).decided()
    assert world.holds("Running") is None
    assert world.pod_runs(1).decided().holds("Running") == "PodsRunning"


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        pytest.param(
            lambda w: w.pod(unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            "WaitingForNodes",
            "Insufficient nvidia.com/gpu",
            id="no node",
        ),
        pytest.param(
            lambda w: w.pod(unschedulable='persistentvolumeclaim "models" not found.'),
            "WaitingForObject",
            "models",
            id="no claim",
        ),
        pytest.param(
            lambda w: w.pod(waiting="ImagePullBackOff", waiting_message="manifest unknown"),
            "WaitingForImage",
            "manifest unknown",
            id="no image",
        ),
        pytest.param(
            lambda w: w.pod(waiting="CreateContainerConfigError", waiting_message='secret "hub" not found'),
            "WaitingForObject",
            "hub",
            id="no Secret for a variable",
        ),
    ],
)
def test_what_pods_wait_for_is_a_condition(change: Callable[[World], World], reason: str, said: str) -> None:
    world = change(World().decided().job_made()).after(SETTLE + 1).decided()
    assert (world.status.phase, world.holds("Waiting")) == ("Waiting", reason)
    assert said in next(each.message for each in world.status.conditions or () if each.type == "Waiting")
    assert world.holds("Reconciling") is None
    assert world.told == [reason]
    assert world.decided().told == []
    assert world.last is not None
    assert world.last.requeue is not None


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        pytest.param(Note("FailedCreate", 'pods "x" is forbidden: exceeded quota: q'), "WaitingForQuota", id="quota"),
        pytest.param(
            Note("FailedCreate", 'error looking up service account team/x: serviceaccount "x" not found'),
            "WaitingForObject",
            id="service account",
        ),
        pytest.param(
            Note("FailedMount", 'MountVolume.SetUp failed for volume "secret-0" : secret "s3" not found'),
            "WaitingForObject",
            id="Secret volume",
        ),
    ],
)
def test_what_only_events_tell_is_a_condition(note: Note, reason: str) -> None:
    world = World().decided().job_made()
    world.notes = [note]
    assert world.after(SETTLE + 1).decided().holds("Waiting") == reason


def test_what_waits_for_no_known_reason_is_starting_not_reconciling_for_ever() -> None:
    world = World().decided().job_made().pod().after(SETTLE + 1).decided()
    assert world.holds("Reconciling") == "Created"
    world.after(START).decided()
    assert (world.status.phase, world.holds("Reconciling")) == ("Starting", None)


def test_a_refused_child_waits_or_fails_by_what_the_api_server_said() -> None:
    world = World().decided()
    world.refused = Refusal("exceeded quota", lasting=False)
    assert world.decide().create is not None
    assert world.holds("Waiting") == "WaitingForQuota"
    world.refused = Refusal("spec.template.spec.affinity: Required value", lasting=True)
    assert world.decide().create is None
    assert world.status.failure is not None
    assert world.status.failure.cause == "UserError"
    assert "affinity" in world.status.failure.message


def test_the_deadline_also_ends_a_job_whose_children_are_refused() -> None:
    world = World(activeDeadlineSeconds=60).decided()
    world.refused = Refusal("exceeded quota", lasting=False)
    assert world.after(59).decide().create is not None
    assert world.after(1).decide().create is None
    assert world.holds("Failed") == "DeadlineExceeded"


# Disruptions


def test_another_first_pod_is_another_run_of_the_same_attempt() -> None:
    world = World().running().after(30).pod_ends(75, {"code": 75, "step": 5}, deleted="x").after(3).pod_runs().decided()
    (attempt,) = world.status.attempts or ()
    assert (attempt.runs, attempt.run_id, attempt.gpu_seconds) == (2, "pod-0-1", 33)
    assert [(each.cause, each.count) for each in world.status.cause_counts or ()] == [("Disruption", 1)]
    assert world.status.counted_failures is None


def test_the_last_words_of_a_run_that_was_stopped_are_kept() -> None:
    latest = Checkpoint(step=5, uri="s3://b/c", digest="sha256:1", time="2026-01-31T12:00:00Z")
    words = {"code": 75, "step": 5, "totalSteps": 10, "checkpoints": CheckpointsStatus(latest=latest).to_wire()}
    disrupted = World().running().pod_ends(75, words, deleted="x").after(3).pod_runs().decided()
    suspended = World().running().edited(suspend=True).decided().carried_out()
    suspended.pod_ends(75, words, deleted="x").job_says(active=0).decided()
    for world in (disrupted, suspended):
        assert world.status.checkpoints is not None
        assert world.status.checkpoints.latest == latest
        assert world.status.progress is not None
        assert world.status.progress.display == "50 % (5/10)"


def test_runs_are_counted_once_also_by_a_restarted_operator_that_sees_the_last_pod_only() -> None:
    world = World().running().after(30)
    world.pods.clear()
    world.pod_runs().pod_says(uid="another").decided().decided()
    (attempt,) = world.status.attempts or ()
    assert (attempt.runs, attempt.run_id) == (2, "another")


def test_a_peer_that_lost_its_drained_peer_is_a_disruption() -> None:
    world = World(resources={"nodes": 2}).running(nodes=2)
    world.pod_ends(75, deleted="x")
    first = world.pods.pop(0)
    world.pods.append(first)
    world.pod_ends(76).after(3).pod_runs(0).pod_runs(1).decided()
    assert [(each.cause, each.count) for each in world.status.cause_counts or ()] == [("Disruption", 1)]


def _ranks_part(world: World, step: int = 0, **fields: Any) -> World:
    """The pod of a job of one node ends because its ranks lost each other; the Job replaces it."""
    world.pod_ends(76, {"code": 76, "step": step, "totalSteps": 10, "message": "a rank went away"}, **fields)
    return world.after(3).pod_runs().decided()


def test_ranks_that_never_meet_use_up_the_retries() -> None:
    world = World(retries=1).running().after(60)
    _ranks_part(world)
    assert world.last is not None
    assert world.last.delete == [world.job]
    assert (_attempts(world), world.holds("Failed")) == ([("Failed", "PeerLost")], None)
    assert [(each.cause, each.count) for each in world.status.cause_counts or ()] == [("PeerLost", 1)]
    world.carried_out().pod_ends(143).after(300).decided().job_made().pod_runs().decided()
    _ranks_part(world)
    assert world.last.delete == [world.job]
    assert world.holds("Failed") == "PeerLost"
    assert world.status.failure is not None
    assert "sharedMemory" in world.status.failure.next_step


def test_ranks_that_part_on_the_way_or_miss_a_pod_cost_no_retry() -> None:
    assert _attempts(_ranks_part(World().running(), step=3)) == [(None, None)]
    waiting = World(resources={"nodes": 2}).running(nodes=2)
    waiting.pod_ends(76).pod(1, unschedulable="0/8 nodes")
    waiting.pods.append(waiting.pods.pop(0))
    assert _attempts(_ranks_part(waiting)) == [(None, None)]


def test_a_disruption_of_an_earlier_run_excuses_no_later_one() -> None:
    world = World(resources={"nodes": 2}).running(nodes=2)
    world.pod_ends(75, deleted="x")
    world.pods.append(world.pods.pop(0))
    world.pod_ends(76).after(3).pod_runs(1).pod_runs(0).decided()
    assert _attempts(world) == [(None, None)]
    _ranks_part(world.after(60))
    assert _attempts(world) == [("Failed", "PeerLost")]


def test_while_pods_are_replaced_it_does_not_say_that_it_runs() -> None:
    world = World().running().pod_ends(75).pod().decided()
    assert (world.status.phase, world.holds("Running")) == ("Starting", None)
    assert world.holds("SpecFrozen") == "Training"


def test_pods_on_a_lost_node_do_not_hold_the_next_attempt() -> None:
    world = World().running().pod_says(deleted="x").decided()
    assert len(world.status.attempts or ()) == 1
    world.lost = {"pod-0-0"}
    decision = world.decide()
    assert _attempts(world) == [("Stopped", "NodeLost"), (None, None)]
    assert [job.uid for job in decision.delete] == ["job-1"]
    assert decision.create is not None
    assert decision.create.attempt == 2


def test_two_runs_at_once_are_never_started() -> None:
    """Other pods of the same Job are alive: the next attempt waits for them to end."""
    world = World(resources={"nodes": 2}).running(nodes=2).pod_says(deleted="x")
    world.lost = {"pod-1-0"}
    decision = world.decide()
    assert (decision.create, decision.requeue) == (None, POLL)
    world.carried_out()
    world.pods = [world.pods[1]]
    assert world.decide().create is not None


def test_a_job_that_somebody_deleted_is_a_disruption_once_it_ran_and_made_again_before() -> None:
    world = World().decided().job_made().job_gone()
    assert world.decide().create is not None
    assert _attempts(world) == [(None, None)]
    world.job_made().pod_runs().decided().job_gone()
    world.pods.clear()
    assert world.decide().create is not None
    assert _attempts(world) == [("Stopped", "Disruption"), (None, None)]


def test_a_job_that_is_being_deleted_is_waited_for() -> None:
    world = World().running().job_says(deleting=True)
    decision = world.decide()
    assert (decision.create, decision.requeue) == (None, POLL)


# Ends


def test_finished_needs_a_record() -> None:
    world = World().running().after(60).pod_ends(0, FINISHED).job_ends("complete").decided()
    assert (world.status.phase, world.holds("Complete")) == ("Complete", "Completed")
    assert world.status.output is not None
    assert world.status.output.digest == "sha256:0"
    assert world.status.usage is not None
    assert (world.status.usage.gpu_seconds, world.status.usage.lost_gpu_seconds) == (60, None)
    assert _attempts(world) == [("Finished", None)]


@pytest.mark.parametrize("message", ["", "done", '{"code": 75}', '{"code": 0, "unknown": 1}'])
def test_a_complete_job_without_a_record_of_the_end_has_failed(message: str) -> None:
    world = World().running().pod_ends(0, message).job_ends("complete").decided()
    assert world.holds("Failed") == "NoVerdict"
    assert world.holds("Complete") is None


def test_progress_is_believed_when_the_record_is_lost_but_only_of_this_attempt() -> None:
    for number, expected in ((1, "Complete"), (2, "Failed")):
        world = World().running()
        world.status.progress = Progress(attempt=number, stage="Finished", step=10, total_steps=10)
        assert world.pod_ends(0).job_ends("complete").decided().status.phase == expected


def test_a_complete_job_never_trains_again() -> None:
    world = World().running().pod_ends(0, FINISHED).job_ends("complete").decided()
    for later in (world.edited(retries=9), world.retry("now"), world.edited(training={"seed": 1}), world.job_gone()):
        decision = later.decide()
        assert (decision.create, decision.delete, world.status.phase) == (None, [], "Complete")
        assert world.status.observed_generation == world.generation
        generations = {each.observed_generation for each in world.status.conditions or ()}
        assert generations == {world.generation}, "else `kubectl wait --for=condition=Complete` never ends"


@pytest.mark.parametrize(
    ("code", "fields", "cause"),
    [
        (64, {}, "UserError"),
        (65, {}, "DataError"),
        (66, {}, "Diverged"),
        (67, {}, "OutOfGpuMemory"),
        (69, {}, "GateFailed"),
        (77, {}, "Fenced"),
        (137, {"exit_reason": "OOMKilled"}, "OutOfMemory"),
    ],
)
def test_what_is_never_retried(code: int, fields: dict[str, str], cause: str) -> None:
    world = World().running().failed(code, **fields)
    assert (world.holds("Failed"), world.holds("Stalled")) == (cause, cause)
    assert _attempts(world) == [("Failed", cause)]
    assert world.status.failure is not None
    assert world.status.failure.exit_code == code


OVER = 'Usage of EmptyDir volume "scratch" exceeds the limit "50Gi". '


@pytest.mark.parametrize(
    "code", [75, 137, None], ids=["it left as if disrupted", "killed", "the container is not told of"]
)
@pytest.mark.parametrize("job_failed", [False, True])
def test_more_than_the_scratch_that_was_asked_for_is_never_retried(code: int | None, job_failed: bool) -> None:
    """A pod that ends with 75 is replaced by its Job, for nothing and for ever."""
    world = World().running().pod_says(phase="Failed", exit_code=code, evicted=OVER)
    if job_failed:
        world.job_ends("failed", "BackoffLimitExceeded: no more tries")
    world.decided()
    assert world.last is not None
    assert [job.name for job in world.last.delete] == ([] if job_failed else [world.job.name])
    assert (world.holds("Failed"), _attempts(world)) == ("UserError", [("Failed", "UserError")])
    assert world.status.failure is not None
    assert 'volume "scratch" exceeds the limit "50Gi"' in world.status.failure.message
    assert "resources.scratch" in (world.status.failure.next_step or "")


@pytest.mark.parametrize(
    ("conditions", "evicted"),
    [([], OVER), ([{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}], None)],
)
def test_a_node_that_is_short_itself_is_no_fault_of_the_pod(
    conditions: list[dict[str, str]], evicted: str | None
) -> None:
    status = {"phase": "Failed", "reason": "Evicted", "message": OVER, "conditions": conditions}
    pod = {"metadata": {"namespace": "team", "name": "p", "uid": "u", "creationTimestamp": "x"}, "status": status}
    assert pod_view(pod).evicted == evicted


@pytest.mark.parametrize(
    ("code", "cause"), [(70, "InternalError"), (74, "StorageError"), (137, "Killed"), (1, "Killed")]
)
def test_what_may_pass_is_tried_again_after_a_pause_that_doubles(code: int, cause: str) -> None:
    world = World(retries=2).running().after(20).failed(code)
    for number, pause in ((2, 10), (3, 20)):
        assert world.last is not None
        assert (world.last.create, world.last.requeue) == (None, pause)
        assert world.after(pause - 1).decide().create is None
        assert world.after(1).decide().create is not None
        world.job_made().pod_runs().decided().after(20).failed(code)
        assert len(world.status.attempts or ()) == number
    assert (world.status.phase, world.status.counted_failures) == ("Failed", 3)
    assert world.status.failure is not None
    assert world.status.failure.cause == cause
    assert world.status.usage is not None
    assert (world.status.usage.gpu_seconds, world.status.usage.lost_gpu_seconds) == (60, 60)


def test_a_pod_that_somebody_took_away_costs_no_retry() -> None:
    world = World(retries=0).running().failed(143, deleted="2026-01-31T12:00:00Z")
    assert _attempts(world) == [("Stopped", "Disruption"), (None, None)]
    assert world.status.counted_failures is None


def test_an_unknown_code_of_a_users_program_is_its_own_and_counts() -> None:
    world = World(runtime={"image": "own:1", "command": ["train"]}, retries=0).running().failed(3)
    assert world.status.failure is not None
    assert (world.status.failure.cause, world.status.failure.exit_code) == ("ProgramFailed", 3)


def test_the_cause_wins_over_its_consequences() -> None:
    world = World(resources={"nodes": 2}).running(nodes=2).pod_ends(65, {"code": 65, "message": "bad row"})
    world.pods.reverse()
    world.pod_ends(76).job_ends("failed").decided()
    assert world.holds("Failed") == "DataError"


def test_without_pods_the_job_controllers_words_tell_the_code() -> None:
    world = World().running()
    world.pods.clear()
    failure = (
        "PodFailurePolicy: Container trainer for pod team/x failed with exit code 66 matching FailJob rule at index 0"
    )
    assert world.job_ends("failed", failure).decided().holds("Failed") == "Diverged"


def test_the_last_word_of_a_users_program_gives_numbers_or_nothing() -> None:
    words = [{"name": "loss", "value": "n/a"}, {"name": "eval_loss", "value": "1.25"}, {"name": "a b", "value": "1"}]
    shots = {"examples": 4, "rows": 9, "before": "2", "prompted": "a secret", "after": "1"}
    message = {"code": 75, "metrics": words, "evaluation": {"before": words, "forgetting": "0.5", "fewShot": shots}}
    world = World(runtime={"image": "own:1", "command": ["train"]}).running()
    world.pod_ends(75, message, deleted="x").job_says(active=0)
    world.pod_runs().decided()
    status = world.status.to_wire()
    assert status["metrics"] == [{"name": "eval_loss", "value": "1.25"}]
    assert status["evaluation"] == {"before": [{"name": "eval_loss", "value": "1.25"}], "forgetting": "0.5"}


@pytest.mark.parametrize("preflight", ["Required", "Skip"])
def test_what_another_version_resolved_and_this_one_cannot_read_fails_with_a_sentence(preflight: str) -> None:
    world = World(preflight=preflight).decided()
    world.status.resolved = {**(world.status.resolved or {}), "training": {"epochs": 3}}
    decision = world.decide()
    assert (decision.create, world.holds("Failed")) == (None, "UserError")
    assert world.status.failure is not None
    assert world.status.failure.message.startswith("status.resolved, which an earlier version wrote: ")


def test_a_retry_keeps_what_was_resolved_and_the_checkpoints() -> None:
    world = World().running()
    latest = Checkpoint(step=5, uri="s3://b/c", digest="sha256:1", time="2026-01-31T12:00:00Z")
    message = {"code": 70, "checkpoints": CheckpointsStatus(latest=latest).to_wire(), "longestSaveSeconds": 400}
    world.failed(70, message).after(10)
    before = world.status.resolved
    decision = world.decide()
    assert decision.create is not None
    assert world.status.resolved == before
    assert decision.create.grace_seconds == 800, "twice the longest save"
    assert world.status.checkpoints is not None
    assert world.status.checkpoints.latest == latest


@pytest.mark.parametrize(
    ("given", "ran", "then"),
    [
        ("registry:5000/own:v1", "registry:5000/own@sha256:ab", "registry:5000/own@sha256:ab"),
        ("registry:5000/own", "registry:5000/own@sha256:ab", "registry:5000/own@sha256:ab"),
        ("own@sha256:cd", "own@sha256:ab", "own@sha256:cd"),
        ("own:v1", "sha256:ab", "own:v1"),
        ("own:v1", "docker.io/library/own@sha256:ab", "own:v1"),
    ],
)
def test_a_retry_runs_the_image_of_the_first_run_whatever_its_tag_says_now(given: str, ran: str, then: str) -> None:
    world = World(runtime={"image": given}).decided().job_made().pod_runs().pod_says(image=ran).decided()
    assert (world.status.attempts or [])[-1].image == ran
    decision = world.failed(70).after(10).decide()
    assert decision.create is not None
    assert decision.create.resolved.spec.runtime.image == then
    assert world.status.resolved is not None
    assert world.status.resolved["runtime"]["image"] == then


# After a failure


def test_an_edit_after_a_failure_starts_over() -> None:
    world = World(retries=0).running().failed(65)
    assert world.decide().create is None
    decision = world.edited(dataset={"train": [{"uri": "s3://bucket/right.jsonl"}]}).decide()
    assert decision.create is not None
    assert world.status.failure is None
    assert (world.holds("Failed"), world.holds("Stalled"), world.status.phase) == (None, None, "Starting")
    first, second = world.status.attempts or ()
    assert (first.spec_digest == second.spec_digest, second.generation) == (False, 2)


def test_each_value_of_the_retry_annotation_counts_once() -> None:
    world = World(retries=0).retry("set before").running().failed(70)
    assert world.decide().create is None, "a value from before the failure asks for nothing"
    assert world.retry("a").decide().create is not None
    assert world.status.counted_failures is None
    world.job_made().pod_runs().decided().failed(70)
    assert world.decide().create is None
    assert world.retry("b").decide().create is not None


def test_fields_that_no_pod_sees_do_not_start_a_failed_job_over() -> None:
    world = World().running().failed(66)
    assert world.edited(retries=5, cleanup={"afterSeconds": 60}).decide().create is None


# Suspension and deadline


def test_suspension_waits_for_the_pods_and_resumes_in_the_same_job() -> None:
    world = World().running().after(30).edited(suspend=True)
    decision = world.decide()
    assert decision.suspend == (world.job, True)
    assert (world.status.phase, world.status.active_seconds) == ("Running", 30)
    world.carried_out().decided()
    assert world.holds("Suspended") is None
    world.after(5).pod_ends(75, {"code": 75}, deleted="x").job_says(active=0).decided()
    assert (world.status.phase, world.holds("Suspended")) == ("Suspended", "Suspended")
    (attempt,) = world.status.attempts or ()
    assert (attempt.gpu_seconds, attempt.run_start_time) == (35, None)
    assert world.decide().suspend is None
    decision = world.after(600).edited(suspend=False).decide()
    assert decision.suspend == (world.job, False)
    world.carried_out().after(2).pod_runs().decided()
    assert (world.status.phase, attempt.gpu_seconds) == ("Running", 35)
    assert [(each.cause, each.count) for each in world.status.cause_counts or ()] == [("Suspended", 1)]


def test_a_job_that_dies_of_its_suspension_is_suspended() -> None:
    world = World(retries=0).running().edited(suspend=True).decided().carried_out()
    world.pod_ends(143, deleted="x").job_ends("failed").decided()
    assert (world.status.phase, _attempts(world)) == ("Suspended", [("Stopped", "Suspended")])
    assert world.edited(suspend=False).decide().create is not None


def test_a_job_that_finishes_while_it_is_being_suspended_is_complete() -> None:
    world = World().running().edited(suspend=True).decided().carried_out()
    assert world.pod_ends(0, FINISHED).job_ends("complete").decided().status.phase == "Complete"


def test_an_edit_of_resources_takes_effect_on_resume() -> None:
    world = World().running().edited(suspend=True).decided().carried_out()
    world.pod_ends(75, deleted="x").job_says(active=0).decided()
    decision = world.edited(suspend=False, resources={"gpusPerNode": 2}).decide()
    assert decision.create is not None
    assert (world.status.gpus, len(world.status.attempts or ())) == (2, 2)
    assert [job.uid for job in decision.delete] == ["job-1"]


def test_an_edit_while_it_trains_waits_for_the_next_job() -> None:
    world = World().running().edited(resources={"gpusPerNode": 2})
    decision = world.decide()
    assert (decision.create, decision.delete, world.status.phase) == (None, [], "Running")
    assert world.told == ["Edited"]
    assert world.decided().told == []


def test_an_edit_before_it_trains_replaces_the_job() -> None:
    world = World(resources={"gpusPerNode": 64}).decided().job_made().edited(resources={"gpusPerNode": 8})
    decision = world.decide()
    assert [job.uid for job in decision.delete] == ["job-1"]
    assert decision.create is not None
    assert (world.status.gpus, _attempts(world)) == (8, [("Stopped", None), (None, None)])


def test_each_suspension_before_the_first_run_is_told() -> None:
    world = World().decided().job_made()
    told = []
    for suspend in (True, False, True, False):
        told += world.edited(suspend=suspend).decide().events
        told += world.carried_out().decide().events
    assert [event.reason for event in told] == 2 * ["Suspending", "Suspended", "Resumed"]
    assert len({(event.reason, event.turn) for event in told}) == len(told)


def test_suspended_from_the_start_makes_nothing() -> None:
    world = World(suspend=True)
    assert world.decide().create is None
    assert world.status.phase == "Suspended"
    assert world.edited(suspend=False).decide().create is not None


def test_the_deadline_lets_pods_save_and_then_fails() -> None:
    world = World(activeDeadlineSeconds=60).running()
    assert world.last is not None
    assert world.last.requeue == pytest.approx(60.5)
    decision = world.after(60).decide()
    assert decision.suspend == (world.job, True)
    assert world.holds("Failed") is None
    world.carried_out().after(100).decided()
    assert world.holds("Failed") is None, "the pod is still saving"
    world.pod_ends(75, deleted="x").job_says(active=0)
    decision = world.decide()
    assert world.holds("Failed") == "DeadlineExceeded"
    assert decision.delete == [world.job]
    assert _attempts(world) == [("Failed", "DeadlineExceeded")]


def test_suspended_time_does_not_count_towards_the_deadline() -> None:
    world = World(activeDeadlineSeconds=60).running().after(50).edited(suspend=True).decided().carried_out()
    world.pod_ends(75, deleted="x").job_says(active=0).decided().after(1000).decided()
    assert world.status.phase == "Suspended"
    world.edited(suspend=False).decided().carried_out().pod_runs().decided()
    assert world.status.phase == "Running"
    assert world.after(9).decide().suspend is None
    assert world.after(1).decide().suspend == (world.job, True)


def test_a_job_that_is_not_resumed_yet_has_spent_nothing() -> None:
    meta = {"namespace": "n", "name": "j", "uid": "u", "creationTimestamp": "2026-01-31T12:00:00Z"}
    suspended = {"type": "Suspended", "status": "True", "lastTransitionTime": "2026-01-31T12:01:00Z"}
    status = {"startTime": "2026-01-31T12:00:00Z", "conditions": [suspended]}
    job = {"metadata": meta, "spec": {"suspend": False}, "status": status}
    later = datetime(2026, 2, 28, tzinfo=UTC)
    assert active_seconds(job_view(job), later) == 0
    status |= {"startTime": "2026-02-27T23:59:50Z", "conditions": [suspended | {"status": "False"}]}
    assert active_seconds(job_view(job), later) == 10


def test_the_deadline_counts_time_of_earlier_attempts() -> None:
    world = World(activeDeadlineSeconds=60).running().after(50).failed(70).after(10)
    world.decided().job_made().pod_runs().decided()
    assert world.status.phase == "Running"
    assert world.after(10).decide().suspend == (world.job, True)


# After the end


def test_cleanup_removes_the_children_in_time_and_once() -> None:
    world = World(cleanup={"afterSeconds": 60}).running().pod_ends(0, FINISHED).job_ends("complete").decided()
    assert world.last is not None
    assert (world.last.delete, world.last.requeue) == ([], pytest.approx(60.1)), "nothing else will wake it"
    decision = world.after(61).decide()
    assert decision.delete == [world.job]
    assert world.carried_out().decide().settled


def test_a_job_that_outlived_the_end_of_its_attempt_is_deleted() -> None:
    world = World(resources={"nodes": 2}).decided().job_made()
    world.unshared = Unshared("data", ["ReadWriteOnce"])
    world.decided()
    assert world.holds("Failed") == "VolumeNotShared"
    decision = world.decide()  # the deletion of the last pass did not come about
    assert (decision.delete, decision.settled) == ([world.job], False)
    assert world.carried_out().decide().settled


def test_how_long_a_save_took_cannot_keep_pods_for_ever() -> None:
    world = World().running()
    world.status.checkpoints = CheckpointsStatus(longest_save_seconds=10**12)
    world.failed(70).after(300).decided()
    assert world.last is not None
    assert world.last.create is not None
    assert world.last.create.grace_seconds == 86_400


def test_of_earlier_attempts_the_latest_ended_job_stays_to_be_looked_at() -> None:
    world = World(retries=5).running()
    for _ in range(3):
        world.failed(70).after(300).decided().carried_out().job_made().pod_runs().decided()
    assert [job.attempt for job in world.jobs.values()] == [3, 4]


def test_of_many_attempts_the_first_and_last_ten_are_kept() -> None:
    world = World(retries=40).running()
    for _ in range(29):
        world.failed(70).after(300).decided().carried_out().job_made().pod_runs().decided()
    assert [attempt.number for attempt in world.status.attempts or ()] == [*range(1, 11), *range(21, 31)]
    assert [(each.cause, each.count) for each in world.status.cause_counts or ()] == [("InternalError", 29)]
