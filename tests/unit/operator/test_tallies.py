"""Each end is counted once, by what a status write changed."""

from finetune_crds.v1alpha1 import FineTuneJobStatus
from finetune_operator.metrics import Metrics
from finetune_operator.tallies import tally

from .builders import FINISHED, World


def _count(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_a_story_with_a_retry_is_counted_end_by_end() -> None:
    metrics, before = Metrics(), FineTuneJobStatus()
    world = World()

    def passed() -> None:
        nonlocal before
        tally(metrics, before, world.status)
        before = world.status

    for step in (
        lambda: world.decided().job_made(),
        lambda: world.after(4).pod_runs().decided(),
        lambda: world.after(30).failed(70),
        lambda: world.after(10).decided().job_made().pod_runs().decided(),
        lambda: world.after(60).pod_ends(0, FINISHED).job_ends("complete").decided(),
        lambda: world.decided(),
    ):
        step()
        passed()
    assert _count(metrics, "finetune_attempts_total", cause="InternalError") == 1
    assert _count(metrics, "finetune_attempts_total", cause="Finished") == 1
    assert _count(metrics, "finetune_gpu_seconds_total", outcome="Failed") == 30
    assert _count(metrics, "finetune_gpu_seconds_total", outcome="Finished") == 60
    assert _count(metrics, "finetune_job_queue_seconds_sum") == 4
    assert _count(metrics, "finetune_job_train_seconds_sum", result="Complete") == 100
    assert _count(metrics, "finetune_job_train_seconds_count", result="Complete") == 1
