"""What comes before an attempt: a preflight that passes, fails, is lost, is stopped. On a world in memory."""

from collections.abc import Callable
from typing import Any

import pytest

from finetune_crds.names import LABEL_ATTEMPT, LABEL_PREFLIGHT
from finetune_crds.quantities import amount
from finetune_crds.v1alpha1 import Preflight
from finetune_operator import children
from finetune_operator.preflight import LOSSES
from finetune_operator.seen import Refusal, Unshared
from finetune_operator.turn import SETTLE

from .builders import FINISHED, World

FOUND = {
    "rows": 900,
    "evaluationRows": 18,
    "tokens": 120_000,
    "longestRow": 700,
    "steps": 170,
    "parameters": 1_200_000_000,
    "trainedParameters": 11_000_000,
    "memory": {"weights": "2300Mi", "training": "200Mi", "activations": "7000Mi", "total": "9500Mi"},
}
PASSED = {"code": 0, "step": 0, "totalSteps": 0, "inputs": {"rows": 900, "modelDigest": "sha256:m"}, "preflight": FOUND}
WRONG = {"code": 65, "message": "train.jsonl row 7: messages is missing"}


def world(**spec: Any) -> World:
    return World(preflight="Required", **spec)


def running(**spec: Any) -> World:
    return world(**spec).decided().job_made().pod_runs().decided()


def passed(**spec: Any) -> World:
    return running(**spec).after(30).pod_ends(0, PASSED).job_ends("complete").decided()


def lost(w: World) -> World:
    """Its pod is taken away, and the Job has failed by that."""
    return (
        w.pod_says(phase="Failed", disrupted="TaintManagerEviction", exit_code=143).job_ends("failed", "gone").decided()
    )


def check(w: World) -> Preflight:
    assert w.status.preflight is not None
    return w.status.preflight


def trains(w: World) -> bool:
    """Whether the last decision makes the Job of an attempt."""
    assert w.last is not None
    return w.last.create is not None and not w.last.create.preflight


def test_it_is_recorded_before_its_job_is_made_and_no_attempt_is() -> None:
    w = world()
    decision = w.decide()
    assert decision.create is not None and decision.create.preflight == 1
    assert w.status.attempts is None
    assert (check(w).state, check(w).attempt, check(w).spec_digest) == ("Running", 1, decision.create.resolved.digest)
    assert w.status.phase == "Preflight"
    assert w.told == ["PreflightRunning"]
    assert w.status.resolved == decision.create.resolved.spec.to_wire()


def test_it_is_required_with_gpus_and_skipped_without_unless_somebody_says() -> None:
    def checks(**spec: Any) -> bool:
        w = World(**spec)
        if "preflight" not in spec:
            del w.spec["preflight"]
        return bool((made := w.decide().create) and made.preflight)

    assert checks()
    assert checks(resources={"gpusPerNode": 8})
    assert checks(resources={"gpusPerNode": 0}, preflight="Required")
    assert not checks(resources={"gpusPerNode": 0})
    assert not checks(preflight="Skip")
    assert not checks(runtime={"image": "mine:1", "command": ["train"]})


def test_what_passed_is_in_status_and_an_attempt_begins_in_the_same_pass() -> None:
    w = passed()
    assert trains(w)
    assert (check(w).state, check(w).start_time, check(w).completion_time) == (
        "Passed", "2026-01-31T12:00:00Z", "2026-01-31T12:00:30Z",
    )  # fmt: skip
    report = check(w).report
    assert report is not None and (report.rows, report.tokens, report.steps) == (900, 120_000, 170)
    assert report.memory is not None and report.memory.total == "9500Mi"
    assert w.holds("PreflightPassed") == "PreflightPassed"
    assert w.status.inputs is not None and w.status.inputs.rows == 900
    assert w.told == ["PreflightPassed", "Created"]
    assert w.status.phase == "Starting"
    (attempt,) = w.status.attempts or ()
    assert (attempt.number, attempt.spec_digest) == (1, check(w).spec_digest)


def test_no_gpu_is_booked_for_it() -> None:
    w = passed()
    assert w.status.usage is None
    w = w.job_made().pod_runs().decided().after(10).pod_ends(0, FINISHED).job_ends("complete").decided()
    assert w.holds("Complete")
    assert w.status.usage is not None and w.status.usage.gpu_seconds == 10


def test_a_job_that_trains_is_not_checked_again_by_retry_suspension_or_its_end() -> None:
    w = passed(retries=2).job_made().pod_runs().decided().failed(70).after(11).decided()
    assert trains(w), "a retry"
    w = w.job_made().pod_runs().decided().edited(suspend=True).decided().carried_out().pod_ends(75).decided()
    w = w.job_says(active=0).decided()
    assert w.holds("Suspended")
    w = w.edited(suspend=False, resources={"gpusPerNode": 2}).decided().decided()
    assert trains(w), "an edit of what does not decide the outcome"
    assert check(w).number == 1


@pytest.mark.parametrize(
    ("message", "cause"),
    [(WRONG, "DataError"), ({"code": 64, "message": "spec.model: no such folder"}, "UserError")],
)
def test_what_is_wrong_fails_the_job_at_once(message: dict[str, Any], cause: str) -> None:
    w = running(retries=5).failed(message["code"], message)
    assert (w.status.phase, w.holds("Failed"), w.holds("Stalled")) == ("Failed", cause, cause)
    assert w.status.failure is not None and w.status.failure.message == message["message"]
    assert check(w).state == "Failed"
    assert w.status.attempts is None and w.status.usage is None and w.status.counted_failures is None
    assert not trains(w) and w.after(3600).decide().create is None
    reasons = {each.type: each.reason for each in w.status.conditions or ()}
    assert reasons["PreflightPassed"] == "PreflightFailed"
    assert reasons["SpecFrozen"] == "Failed"


def test_after_a_failure_an_edit_or_the_annotation_checks_again_and_skip_trains() -> None:
    edited = running().failed(65, WRONG).edited(training={"epochs": "1"}).decided()
    assert edited.last and edited.last.create and edited.last.create.preflight == 2
    assert edited.status.failure is None and edited.told == ["Edited", "PreflightRunning"]
    again = running().failed(65, WRONG).retry("1").decided()
    assert again.last and again.last.create and again.last.create.preflight == 2
    assert again.told == ["Retrying", "PreflightRunning"]
    first = again.job
    again = again.job_made().pod_runs().decided().pod_ends(0, PASSED).job_ends("complete").decided()
    assert trains(again)
    assert again.last is not None and again.last.delete == [first], "until then it could be looked at"
    skipped = running().failed(65, WRONG).edited(preflight="Skip").decided()
    assert trains(skipped)


def test_an_edit_of_the_outcome_after_a_failed_attempt_is_checked_again() -> None:
    w = passed().job_made().pod_runs().decided().failed(66).edited(training={"learningRate": "1e-5"}).decided()
    assert not trains(w)
    assert (check(w).number, check(w).attempt, check(w).state) == (2, 2, "Running")
    w = w.job_made().pod_runs().decided().pod_ends(0, PASSED).job_ends("complete").decided()
    assert trains(w) and len(w.status.attempts or ()) == 2


def test_a_lost_pod_costs_nothing_and_is_repeated_after_a_pause() -> None:
    w = lost(running(retries=0))
    assert (check(w).state, check(w).losses, w.status.phase, w.status.failure) == ("Stopped", 1, "Preflight", None)
    assert w.told == ["PreflightLost"]
    assert w.last is not None and w.last.create is None and w.last.requeue == 10
    w = w.after(11).decided()
    assert w.last and w.last.create and w.last.create.preflight == 2
    w = w.job_made().pod_runs().decided().pod_ends(0, PASSED).job_ends("complete").decided()
    assert trains(w) and w.status.counted_failures is None


def test_a_pod_that_is_always_taken_away_fails_it_in_the_end() -> None:
    w = running()
    for _ in range(LOSSES):
        w = lost(w)
        assert w.status.failure is None
        w = w.after(301).decided().job_made().pod_runs().decided()
    w = lost(w)
    assert w.holds("Failed") == "Disruption"
    w = w.retry("now").decided()
    assert check(w).losses is None, "a retry begins to count anew"


def test_what_may_pass_is_repeated_as_often_as_retries_says_apart_from_those_of_training() -> None:
    storage = {"code": 74, "message": "s3://bucket: no answer"}
    w = running(retries=1).failed(74, storage)
    assert (check(w).failures, w.status.failure) == (1, None)
    w = w.after(11).decided().job_made().pod_runs().decided().failed(74, storage)
    assert w.holds("Failed") == "StorageError"
    assert w.status.counted_failures is None


def test_complete_alone_is_no_success() -> None:
    w = running().pod_ends(0).job_ends("complete").decided()
    assert not trains(w) and (check(w).state, check(w).failures) == ("Stopped", 1)
    w = running().pod_ends(0, FINISHED).job_ends("complete").decided()
    assert not trains(w), "a record of training says nothing of a preflight"


def test_a_lost_node_does_not_hold_it_up() -> None:
    w = running().pod_says(deleted="2026-01-31T12:00:10Z")
    w.lost = {w.pods[-1].uid}
    w = w.decided()
    assert w.last is not None and w.last.delete == [w.job]
    assert (check(w).state, check(w).losses) == ("Stopped", 1)
    w = w.after(11).decided()
    assert w.last and w.last.create and w.last.create.preflight == 2, "its pod stays Terminating for ever"


def test_suspension_deletes_it_and_resumption_checks_again() -> None:
    w = running().edited(suspend=True).decided()
    assert w.last is not None and w.last.delete == [w.job] and w.last.suspend is None
    assert w.holds("Suspended") is None, "its pod is still there"
    w = w.carried_out().pod_says(gone=True).decided()
    assert (w.holds("Suspended"), w.status.phase, check(w).state) == ("Suspended", "Suspended", "Stopped")
    w = w.edited(suspend=False).decided()
    assert w.last and w.last.create and w.last.create.preflight == 2
    assert check(w).losses is None


def test_a_job_made_suspended_is_checked_when_it_is_resumed() -> None:
    w = world(suspend=True).decided()
    assert w.last is not None and w.last.create is None and w.status.preflight is None
    w = w.edited(suspend=False).decided()
    assert w.last.create is None or w.last.create.preflight
    assert check(w).state == "Running"


def test_an_edit_replaces_it() -> None:
    w = running().edited(training={"epochs": "1"}).decided()
    assert w.last is not None and w.job in w.last.delete
    assert w.told[0] == "Edited"
    w = w.carried_out().pod_says(gone=True).after(1).decided()
    assert w.last.create is not None or check(w).number == 2
    assert (check(w).number, check(w).losses) == (2, None)
    assert w.status.resolved is not None and w.status.resolved["training"]["epochs"] == "1"


def test_skip_in_the_middle_goes_on_without_it() -> None:
    w = running().edited(preflight="Skip").decided()
    assert w.last is not None and w.job in w.last.delete
    assert trains(w.carried_out().pod_says(gone=True).decided())


def test_the_deadline_counts_its_time() -> None:
    w = running(activeDeadlineSeconds=60).after(61).decided()
    assert w.holds("Failed") == "DeadlineExceeded"
    assert w.last is not None and w.last.delete == [w.job]
    w = passed(activeDeadlineSeconds=60)
    assert w.status.active_seconds == 30
    w = w.job_made().pod_runs().decided().after(31).decided()
    assert w.last is not None and w.last.suspend is not None, "30 s were left"


def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    w = running()
    w.deleting = True
    decision = w.decide()
    assert (decision.create, decision.delete, decision.events) == (None, [], [])


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda: world().decided(), id="recorded"),
        pytest.param(running, id="running"),
        pytest.param(lambda: running().failed(65, WRONG), id="failed"),
        pytest.param(lambda: lost(running()), id="lost"),
    ],
)
def test_a_second_pass_and_another_operator_change_nothing(moment: Callable[[], World]) -> None:
    w = moment()
    before = w.status
    assert w.decide().status == before
    assert w.told == []


def test_its_children_are_the_same_after_a_crash_and_an_upgrade() -> None:
    w = world()
    first = w.decide().create
    again = w.after(60).decide().create
    assert first is not None and again is not None
    assert (again.resolved, again.preflight) == (first.resolved, first.preflight)


def test_an_operator_that_missed_the_deletion_of_its_job_makes_another() -> None:
    w = running().job_gone().pod_says(gone=True).decided()
    assert (check(w).state, check(w).losses) == ("Stopped", 1)


def test_a_refusal_is_waited_for_or_fails_it() -> None:
    w = world().decided()
    w.refused = Refusal("exceeded quota", lasting=False)
    w = w.after(6).decided()
    assert w.holds("Waiting") == "WaitingForQuota" and w.last and w.last.create
    w.refused = Refusal("is invalid", lasting=True)
    assert w.decided().holds("Failed") == "UserError"


def test_what_its_pod_waits_for_is_a_condition() -> None:
    w = world().decided().job_made().pod(unschedulable='persistentvolumeclaim "models" not found.')
    w = w.after(SETTLE + 1).decided()
    assert (w.status.phase, w.holds("Waiting")) == ("Waiting", "WaitingForObject")
    w = w.pod_says(unschedulable=None, phase="Running", running_since="2026-01-31T12:00:09Z").decided()
    assert (w.status.phase, w.holds("Reconciling")) == ("Preflight", None)


def test_a_claim_of_one_node_is_refused_without_it() -> None:
    w = world(resources={"nodes": 2})
    w.unshared = Unshared("disk", ["ReadWriteOnce"])
    w = w.decided()
    assert w.holds("Failed") == "VolumeNotShared" and w.status.preflight is None


def test_cleaning_takes_it_along() -> None:
    w = running(cleanup={"afterSeconds": 5}).failed(65, WRONG).after(6).decided()
    assert w.last is not None and w.last.delete == [w.job]


# Its children


def _children(**spec: Any) -> children.Children:
    plan = world(**spec).decide().create
    assert plan is not None
    around = children.Surroundings("trainer:1", "https://progress/", "progress", "CA")
    return children.build_preflight(
        plan.resolved, number=plan.preflight, grace_seconds=plan.grace_seconds, around=around
    )


RESOURCES = {
    "nodes": 2,
    "gpusPerNode": 8,
    "nodeSelector": {"zone": "a"},
    "tolerations": [{"key": "team", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}


def test_its_pod_is_the_training_pod_without_gpu_peer_and_token() -> None:
    made = _children(resources=RESOURCES, runtime={"serviceAccountName": "reader"})
    pod = made.job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "256Gi"}}
    assert container["command"][-2:] == ["finetune_trainer.worker", "preflight"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert (environment["FINETUNE_NODES"], environment["FINETUNE_PROCESSES_PER_NODE"]) == ("1", "1")
    assert "KUBEFLOW_TRAINER_SERVER_URL" not in environment
    assert all("projected" not in volume for volume in pod["volumes"])
    assert (pod["nodeSelector"], pod["affinity"], pod["serviceAccountName"]) == (
        {"zone": "a"}, {"nodeAffinity": {}}, "reader",
    )  # fmt: skip
    assert {"key": "team", "operator": "Exists"} in pod["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert (made.service, made.job["spec"]["completions"]) == (None, 1)


def test_its_labels_keep_it_apart_from_training() -> None:
    made = _children()
    labels = made.job["spec"]["template"]["metadata"]["labels"]
    assert labels[LABEL_PREFLIGHT] == "1" and LABEL_ATTEMPT not in labels
    assert made.job["metadata"]["name"].endswith("-p1") == made.config_map["metadata"]["name"].endswith("-p1")


def test_it_asks_for_no_more_than_training() -> None:
    small = {"gpusPerNode": 1, "memory": "2Gi", "cpu": "500m"}
    (container,) = _children(resources=small).job["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", "0.5"), ("4Gi", "4294967296"), ("2", "2"), ("1e3", "1000"), ("1.5k", "1500"), ("3E", "3e18")],
)
def test_quantities(text: str, value: str) -> None:
    assert amount(text) == amount(value)
    with pytest.raises(ValueError, match="no quantity"):
        amount("four")


def test_a_job_that_has_trained_is_not_checked_again() -> None:
    """Its spec is frozen: a preflight would open it for edits in the middle of training."""
    w = world()
    w.spec["preflight"] = "Skip"
    w.decided().job_made().pod_runs().decided()
    w.spec["suspend"] = True
    w.decided().pod_ends(75).job_ends("failed").decided()
    del w.spec["preflight"], w.spec["suspend"]
    w.spec["resources"] = {**w.spec.get("resources", {}), "memory": "9Gi"}
    w.decided()
    assert w.status.preflight is None
    assert {c.type: c.status for c in w.status.conditions or ()}["SpecFrozen"] == "True"


def test_a_volume_that_is_not_made_yet_is_made_for_a_pod_with_a_gpu() -> None:
    w = world()
    del w.spec["preflight"]
    w.unbound = "models"
    w.decided()
    assert trains(w) and w.status.preflight is None
    (told,) = [c for c in w.status.conditions or () if c.type == "PreflightPassed"]
    assert told.reason == "PreflightLeftOut" and "claim models" in told.message
    bound = world()
    del bound.spec["preflight"]
    assert not trains(bound.decided())


def test_what_fails_again_after_an_edit_or_a_retry_is_told_again() -> None:
    """An event is written once for each name, so each turn of the story has a name of its own."""
    w = running()
    told = []
    for again in (
        lambda: w.edited(training={"seed": 1}),
        lambda: w.retry("now"),
        lambda: w.edited(training={"seed": 2}),
    ):
        w.failed(65, WRONG)
        assert w.last is not None
        told += w.last.events
        again().decided().job_made()
        told += w.last.events
        w.pod_runs().decided()
    turns = [(event.reason, event.turn) for event in told if event.reason in ("Failed", "Edited", "Retrying")]
    assert [reason for reason, _ in turns] == ["Failed", "Edited", "Failed", "Retrying", "Failed", "Edited"]
    assert len(set(turns)) == len(turns)


def test_more_than_the_scratch_that_was_asked_for_fails_it_whatever_its_pod_left_with() -> None:
    w = (
        running()
        .pod_says(phase="Failed", exit_code=75, evicted='Usage of EmptyDir volume "scratch" exceeds the limit')
        .decided()
    )
    assert (check(w).state, w.holds("Failed")) == ("Failed", "UserError")
    assert w.last is not None and [job.name for job in w.last.delete] == [w.job.name]
