"""Which fields of status the operator applies: leaving one out deletes it, unless the progress server owns it too."""

from finetune_crds.v1alpha1 import Checkpoint, CheckpointsStatus, Progress
from finetune_operator.act import owned

from .builders import FINISHED, World


def _reported(world: World, *, pod: str, attempt: int = 1) -> World:
    latest = Checkpoint(step=5, uri="s3://b/c", digest="sha256:1", time="2026-01-31T12:00:00Z")
    world.status.progress = Progress(attempt=attempt, pod=pod, step=5)
    world.status.checkpoints = CheckpointsStatus(latest=latest)
    return world


def _keeps(world: World) -> bool:
    wire = owned(world.status, world.pods)
    assert ("progress" in wire) == ("checkpoints" in wire)
    return "checkpoints" in wire


def test_what_the_current_run_reports_is_the_progress_servers() -> None:
    world = World().running()
    assert not _keeps(_reported(world, pod=world.pods[0].name))


def test_until_a_new_run_reports_the_operator_keeps_what_the_last_one_said() -> None:
    world = World().running()
    _reported(world, pod=world.pods[0].name)
    assert _keeps(world.pod_ends(75, deleted="x").after(3).pod_runs().decided())


def test_after_the_end_and_between_attempts_the_operator_keeps_it() -> None:
    done = World().running()
    _reported(done, pod=done.pods[0].name)
    assert _keeps(done.pod_ends(0, FINISHED).job_ends("complete").decided())
    retried = World().running()
    _reported(retried, pod=retried.pods[0].name)
    assert _keeps(retried.failed(70).after(300).decided())


def test_after_an_edit_it_is_no_longer_about_this_job() -> None:
    world = World().running()
    _reported(world, pod=world.pods[0].name)
    world.failed(66).edited(training={"seed": 1}).decided()
    assert not _keeps(world)
